"""What a diffusion model learns to make: pixels, latents that are encoded as training goes, or latents of a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from torch import nn

from .data import DataArguments, LabelledImages, LatentCache, RandomFlip, RandomMirror, load_images
from .data.latent_cache import is_latent_cache
from .latent_encoding.vae import check_images_fit, check_vae, describe_vae, latent_shape
from .sdt.arguments import ModelArguments
from .sdt.latents import LatentNormalisation, posterior_moments, sample_posterior, vae_spatial_scale
from .training.draws import Draws


@dataclass
class TrainingData:
    """The images of a run, and the way from what is stored of them to what the model learns to make.

    Args:
        images: The data set; see `ShuffledStream`.
        vae: The VAE, with the normalisation that decoding has to use; `None` to learn pixels.
        augment: See `ShuffledStream`.
        sample_shape: Channels, height and width of what the model makes.
    """

    images: LabelledImages | LatentCache
    vae: nn.Module | None
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


def open_training_data(data: DataArguments, model: ModelArguments, seed: int) -> TrainingData:
    """Opens the data set, or the cache of latents, that the arguments name.

    Args:
        data: The data; values left open are filled in.
        model: The model; its VAE is filled in from a cache.
        seed: Seed of the run, for mirrored images.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If the data cannot be used, do not fit the VAE, or are of another one.
    """
    folder = Path(data.dataset).expanduser()
    if is_latent_cache(folder):
        return _open_cache(folder, data, model, seed)
    vae = _load_vae(model.pretrained_vae_model_name_or_path)
    images = load_images(data, default_resolution=model.config()["sample_size"] * vae_spatial_scale(vae))
    augment = RandomFlip(seed) if data.random_flip else None
    if vae is None:
        return TrainingData(images, None, augment, (images.num_channels, data.resolution, data.resolution))
    check_images_fit(vae, data)
    return TrainingData(images, vae, augment, latent_shape(vae, data.resolution))


def _open_cache(folder, data, model, seed):
    images = LatentCache(folder, mirrors=data.random_flip)
    settings = images.manifest["settings"]
    for key in ("resolution", "image_mode"):
        if getattr(data, key) not in (None, settings[key]):
            raise ValueError(f"--{key} {getattr(data, key)}: {folder} was encoded with {settings[key]}.")
        setattr(data, key, settings[key])
    model.pretrained_vae_model_name_or_path = model.pretrained_vae_model_name_or_path or images.manifest["vae_name"]
    vae = _load_vae(model.pretrained_vae_model_name_or_path)
    check_vae(vae, folder, images.manifest)
    # Decoding has to undo what training does, whatever the VAE's own config says by now.
    vae.register_to_config(**{key: settings[key] for key in LatentNormalisation._fields})
    return TrainingData(images, vae, RandomMirror(seed) if data.random_flip else None, images.latent_shape)


def _load_vae(name):
    return None if name is None else AutoModel.from_pretrained(name).eval().requires_grad_(False)
