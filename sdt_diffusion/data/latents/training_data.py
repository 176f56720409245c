"""What a diffusion model is trained on: pixels, latents encoded during training, or latents of a cache."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import nn

from ...sdt.loading import without_reports
from ...sdt.vae import (
    VAE_CLASSES,
    LatentNormalization,
    VAELayout,
    check_images_fit,
    check_vae,
    describe_vae,
    latent_shape,
    posterior_moments,
    sample_posterior,
)
from ...utils.files import local_path
from ...utils.reading import shortened, verify_checksums
from ...utils.seeding import Draws
from .. import DataArguments, LabeledImages, LatentCache, RandomFlip, RandomMirror, load_images
from ..images import means_digits
from .cache import is_latent_cache


@dataclass
class TrainingData:
    """The images of a run, and the way batches of them become clean pixels or latents.

    Args:
        arguments: The data arguments, complete; see `ImageArguments.resolved`.
        images: The data set; see `ShuffledStream`.
        vae: The VAE, with the normalization that decoding has to use; `None` to train on pixels.
        vae_name: Where the VAE came from.
        augment: See `ShuffledStream`.
        sample_shape: Channels, height and width of the model's samples.
    """

    arguments: DataArguments
    images: LabeledImages | LatentCache
    vae: nn.Module | None
    vae_name: str | None
    augment: Callable[[Any, int], torch.Tensor] | None
    sample_shape: tuple[int, int, int]

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the latents, independent of paths; a resumed run must have the same."""
        if self.vae is None:
            return {}
        if isinstance(self.images, LatentCache):  # the fingerprint covers the VAE
            return {"cache of latents": self.images.fingerprint}
        return {**describe_vae(self.vae), **LatentNormalization.of(self.vae)._asdict()}

    @property
    def relocatable_arguments(self) -> tuple[str, ...]:
        """Arguments that hold paths and may change when a run is resumed, because `identity` is checked instead."""
        if self.vae is None:
            return ()
        return ("pretrained_vae_model_name_or_path", *(["dataset"] if self.is_cached else []))

    @property
    def is_cached(self) -> bool:
        """Whether the images are stored as latents."""
        return isinstance(self.images, LatentCache)

    def clean(self, batch: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Return the clean pixels or latents that the model learns to generate.

        Args:
            batch: Pixels in -1 to 1, or moments of a cache, shape (batch, ...).
            draws: The batch's random numbers, for the noise of the posteriors.

        Returns:
            Pixels or normalized latents, shape (batch, *sample_shape).
        """
        if self.vae is None:
            return batch
        moments = batch if self.is_cached else posterior_moments(self.vae, batch)  # (B, 1 or 2, C, H, W)
        return sample_posterior(moments, draws.normal(self.sample_shape), LatentNormalization.of(self.vae))


def open_training_data(data: DataArguments, vae_name: str | None, default_sample_size: int, seed: int) -> TrainingData:
    """Open the data set, or the cache of latents, that the arguments name.

    Args:
        data: The data arguments, which stay as they are; those of the data returned are complete.
        vae_name: Folder or Hub name of the VAE; a cache names its own, and without either the data are pixels.
        default_sample_size: Side of the model's samples if neither `data` nor the VAE sets the resolution.
        seed: Seed of the run, for mirrored images.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If the data cannot be used, do not fit the VAE, or are of another one.
    """
    folder = local_path(data.dataset)
    if not means_digits(data.dataset) and is_latent_cache(folder):
        return _open_cache(folder, data, vae_name, seed)
    vae = load_vae(vae_name) if vae_name is not None else None
    default_resolution = default_sample_size
    if vae is not None:
        layout = VAELayout.of(vae)
        default_resolution = layout.resolution or default_sample_size * layout.spatial_scale
    data = data.resolved(default_resolution)
    resolution, image_mode = data.size_and_mode
    images = load_images(data, resolution)
    augment = RandomFlip(seed) if data.random_flip else None
    if vae is None:
        shape = (images.num_channels, resolution, resolution)
        return TrainingData(data, images, None, None, augment, shape)
    check_images_fit(vae, resolution, image_mode)
    return TrainingData(data, images, vae, vae_name, augment, latent_shape(vae, resolution))


def _open_cache(folder, data, vae_name, seed):
    images = LatentCache(folder, data.random_flip, data.class_names)
    settings = images.manifest["settings"]
    encoded = {key: settings[key] for key in ("resolution", "image_mode")}
    for key, value in encoded.items():
        if getattr(data, key) not in (None, value):
            raise ValueError(f"{key} is {getattr(data, key)}, but {folder} was encoded with {value}: leave it out.")
    data = replace(data, **encoded)
    vae_name = vae_name or images.manifest["vae_name"]
    if vae_name is None:
        raise ValueError(f"{folder} names no VAE: give pretrained_vae_model_name_or_path.")
    vae = load_vae(vae_name)
    check_vae(vae, folder, images.manifest)
    # Decoding has to undo the normalization of the cache, even if the VAE's config has changed since.
    LatentNormalization(*(settings[key] for key in LatentNormalization._fields)).register_with(vae)
    augment = RandomMirror(seed) if data.random_flip else None
    return TrainingData(data, images, vae, vae_name, augment, images.latent_shape)


def load_vae(name: str) -> nn.Module:
    """Load a VAE, in evaluation mode and without gradients.

    Args:
        name: Folder or Hub name of one of `VAE_CLASSES`.

    Raises:
        ValueError: If it cannot be loaded, is not a VAE, or its weights are damaged, missing or not finite.
    """
    if local_path(name).is_dir():
        verify_checksums(local_path(name))
    try:
        kind = diffusers.AutoencoderKL.load_config(name).get("_class_name")
        if kind not in VAE_CLASSES:
            raise ValueError(f"its config.json names the class {kind!r:.60}, not one of {', '.join(VAE_CLASSES)}")
        with without_reports():
            vae, found = getattr(diffusers, kind).from_pretrained(name, output_loading_info=True)
    except Exception as error:  # diffusers raises errors of many kinds for damaged files
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"Cannot load the VAE {name}: {first_line or type(error).__name__}") from error
    missing = [*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])]
    if missing:
        raise ValueError(f"The weights of the VAE {name} are not complete: {shortened(missing)} are missing.")
    endless = [key for key, value in vae.state_dict().items() if not torch.isfinite(value).all()]
    if endless:
        raise ValueError(f"The weights of the VAE {name} are damaged: {shortened(endless)} are NaN or infinite.")
    return vae.eval().requires_grad_(False)
