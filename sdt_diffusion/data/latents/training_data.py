"""What a diffusion model learns to make: pixels, latents that are encoded as training goes, or latents of a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from torch import nn

from ...sdt.vae import (
    LatentNormalisation,
    check_images_fit,
    check_vae,
    describe_vae,
    latent_shape,
    posterior_moments,
    sample_posterior,
    vae_spatial_scale,
)
from ...utils.seeding import Draws
from .. import DataArguments, LabelledImages, LatentCache, RandomFlip, RandomMirror, load_images
from .cache import is_latent_cache


@dataclass
class TrainingData:
    """The images of a run, and the way from what is stored of them to what the model learns to make.

    Args:
        images: The data set; see `ShuffledStream`.
        vae: The VAE, with the normalisation that decoding has to use; `None` to learn pixels.
        vae_name: Where the VAE came from.
        augment: See `ShuffledStream`.
        sample_shape: Channels, height and width of what the model makes.
    """

    images: LabelledImages | LatentCache
    vae: nn.Module | None
    vae_name: str | None
    augment: Callable[[Any, int], torch.Tensor] | None
    sample_shape: tuple[int, int, int]

    @property
    def identity(self) -> dict[str, Any]:
        """What the latents are, wherever the files of VAE and cache lie: a run goes on with no others."""
        if self.vae is None:
            return {}
        if self.is_cached:  # tells of its VAE too
            return {"cache of latents": self.images.fingerprint}
        return {**describe_vae(self.vae), **LatentNormalisation.of(self.vae)._asdict()}

    @property
    def named_by_identity(self) -> tuple[str, ...]:
        """Arguments whose paths may change while the identity stays."""
        if self.vae is None:
            return ()
        return ("pretrained_vae_model_name_or_path", *(["dataset"] if self.is_cached else []))

    @property
    def is_cached(self) -> bool:
        """Whether the images are stored as latents."""
        return isinstance(self.images, LatentCache)

    def clean(self, batch: torch.Tensor, draws: Draws) -> torch.Tensor:
        """What the model learns to make.

        Args:
            batch: Pixels in -1 to 1, or moments of a cache, shape (batch, ...).
            draws: The batch's random numbers, for the noise of the posteriors.

        Returns:
            Pixels, or normalised latents; shape (batch, *sample_shape).
        """
        if self.vae is None:
            return batch
        moments = batch if self.is_cached else posterior_moments(self.vae, batch)
        return sample_posterior(moments, draws.normal(self.sample_shape), LatentNormalisation.of(self.vae))


def open_training_data(data: DataArguments, vae_name: str | None, default_sample_size: int, seed: int) -> TrainingData:
    """Opens the data set, or the cache of latents, that the arguments name.

    Args:
        data: The data; values left open are filled in.
        vae_name: Folder or Hub name of the VAE; a cache brings its own, without either the model learns pixels.
        default_sample_size: Side of what the model makes where `data` leaves the resolution open.
        seed: Seed of the run, for mirrored images.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If the data cannot be used, do not fit the VAE, or are of another one.
    """
    folder = Path(data.dataset).expanduser()
    if is_latent_cache(folder):
        return _open_cache(folder, data, vae_name, seed)
    vae = _load_vae(vae_name)
    images = load_images(data, default_resolution=default_sample_size * vae_spatial_scale(vae))
    augment = RandomFlip(seed) if data.random_flip else None
    if vae is None:
        return TrainingData(images, None, None, augment, (images.num_channels, data.resolution, data.resolution))
    check_images_fit(vae, data.resolution, data.image_mode)
    return TrainingData(images, vae, vae_name, augment, latent_shape(vae, data.resolution))


def _open_cache(folder, data, vae_name, seed):
    images = LatentCache(folder, mirrors=data.random_flip)
    settings = images.manifest["settings"]
    for key in ("resolution", "image_mode"):
        if getattr(data, key) not in (None, settings[key]):
            raise ValueError(f"--{key} {getattr(data, key)}: {folder} was encoded with {settings[key]}.")
        setattr(data, key, settings[key])
    vae_name = vae_name or images.manifest["vae_name"]
    vae = _load_vae(vae_name)
    check_vae(vae, folder, images.manifest)
    # Decoding has to undo what training does, whatever the VAE's own config says by now.
    vae.register_to_config(**{key: settings[key] for key in LatentNormalisation._fields})
    augment = RandomMirror(seed) if data.random_flip else None
    return TrainingData(images, vae, vae_name, augment, images.latent_shape)


def _load_vae(name):
    return None if name is None else AutoModel.from_pretrained(name).eval().requires_grad_(False)
