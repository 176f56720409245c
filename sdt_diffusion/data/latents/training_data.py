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
from ...utils.fingerprint import differences
from ...utils.reading import shortened, verify_checksums
from ...utils.seeding import Draws
from .. import DataArguments, LabeledImages, LatentCache, RandomFlip, RandomMirror, load_images
from ..images import means_digits
from ..patch_features import EncoderArguments, ImagesWithFeatures, PatchEncoder
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
        feature_shape: Height, width and channels of the features of an image; `None` if there are none.
        encoder: Computes them; `None` if they are read from the cache.
    """

    arguments: DataArguments
    images: LabeledImages | LatentCache
    vae: nn.Module | None
    vae_name: str | None
    augment: Callable[[Any, int], torch.Tensor] | None
    sample_shape: tuple[int, int, int]
    feature_shape: tuple[int, int, int] | None = None
    encoder: PatchEncoder | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies latents and features, independent of paths; a resumed run must have the same."""
        if isinstance(self.images, LatentCache):  # the fingerprint covers the VAE and the encoder
            features = {} if self.feature_shape is None else {"features of the cache": list(self.feature_shape)}
            return {"cache of latents": self.images.fingerprint, **features}
        encoder = {} if self.encoder is None else self.encoder.settings()
        if self.vae is None:
            return encoder
        return {**describe_vae(self.vae), **LatentNormalization.of(self.vae)._asdict(), **encoder}

    @property
    def relocatable_arguments(self) -> tuple[str, ...]:
        """Arguments that hold paths and may change when a run is resumed, because `identity` is checked instead."""
        names = ("pretrained_vae_model_name_or_path",) if self.vae is not None else ()
        return (
            *names,
            *(["dataset"] if self.is_cached else []),
            *(["alignment_model"] if self.feature_shape is not None else []),
        )

    @property
    def is_cached(self) -> bool:
        """Whether the images are stored as latents."""
        return isinstance(self.images, LatentCache)

    def clean(self, batch: torch.Tensor | ImagesWithFeatures, draws: Draws) -> torch.Tensor:
        """Return the clean pixels or latents that the model learns to generate.

        Args:
            batch: Pixels in -1 to 1, or moments of a cache, shape (batch, ...), with or without features.
            draws: The batch's random numbers, for the noise of the posteriors.

        Returns:
            Pixels or normalized latents, shape (batch, *sample_shape).
        """
        batch = batch.images if isinstance(batch, ImagesWithFeatures) else batch
        if self.vae is None:
            return batch
        moments = batch if self.is_cached else posterior_moments(self.vae, batch)  # (B, 1 or 2, C, H, W)
        if moments.ndim == 6:  # (B, 2, 1 or 2, C, H, W): held-out images, whose mirror images are not chosen
            moments = moments[:, 0]
        return sample_posterior(moments, draws.normal(self.sample_shape), LatentNormalization.of(self.vae))

    def features(self, batch: torch.Tensor | ImagesWithFeatures) -> torch.Tensor:
        """Return the features of a batch, as `clean` takes it, shape (batch, *feature_shape).

        Raises:
            ValueError: If the data have none.
        """
        if isinstance(batch, ImagesWithFeatures):
            return batch.features
        if self.encoder is None:
            raise ValueError("The data have no features: open them with an alignment_model.")
        return self.encoder(batch)


def open_training_data(
    data: DataArguments,
    vae_name: str | None,
    default_sample_size: int,
    seed: int,
    encoder_args: EncoderArguments = EncoderArguments(),  # noqa: B008 (immutable)
) -> TrainingData:
    """Open the data set, or the cache of latents, that the arguments name.

    Args:
        data: The data arguments, which stay as they are; those of the data returned are complete.
        vae_name: Folder or Hub name of the VAE; a cache names its own, and without either the data are pixels.
        default_sample_size: Side of the model's samples if neither `data` nor the VAE sets the resolution.
        seed: Seed of the run, for mirrored images.
        encoder_args: Whose features to give besides; a cache of latents must hold them, or there must be pixels.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If the data cannot be used, do not fit the VAE or the encoder, or are of another one.
    """
    folder = local_path(data.dataset)
    if not means_digits(data.dataset) and is_latent_cache(folder):
        return _open_cache(folder, data, vae_name, seed, encoder_args)
    vae = load_vae(vae_name) if vae_name is not None else None
    default_resolution = default_sample_size
    if vae is not None:
        layout = VAELayout.of(vae)
        default_resolution = layout.resolution or default_sample_size * layout.spatial_scale
    data = data.resolved(default_resolution)
    resolution, image_mode = data.size_and_mode
    images = load_images(data, resolution)
    augment = RandomFlip(seed) if data.random_flip else None
    shape = (images.num_channels, resolution, resolution)
    if vae is not None:
        check_images_fit(vae, resolution, image_mode)
        shape = latent_shape(vae, resolution)
    encoder = encoder_args.load()
    if encoder is None:
        return TrainingData(data, images, vae, vae_name, augment, shape)
    encoder.check_channels(images.num_channels)
    return TrainingData(data, images, vae, vae_name, augment, shape, encoder.feature_shape, encoder)


def _open_cache(folder, data, vae_name, seed, encoder_args):
    with_features = encoder_args.alignment_model is not None
    images = LatentCache(folder, data.random_flip, data.class_names, with_features)
    if with_features:
        _check_encoder(folder, images.manifest, encoder_args)
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
    feature_shape = images.feature_shape if with_features else None
    return TrainingData(data, images, vae, vae_name, augment, images.latent_shape, feature_shape)


def _check_encoder(folder, manifest, args):
    """Refuse an encoder whose features the cache does not hold; it is loaded only if its name is another one."""
    name, settings = args.alignment_model, manifest["settings"]
    for key in ("alignment_resolution", "alignment_layer"):
        if getattr(args, key) not in (None, settings[key]):
            raise ValueError(
                f"{key} is {getattr(args, key)}, but the features of {folder} are of {settings[key]}: leave it out."
            )
    if name != manifest["alignment_model"]:
        layer = settings["alignment_layer"]
        found = differences(
            settings, settings | PatchEncoder(name, settings["alignment_resolution"], layer).settings()
        )
        if found:
            raise ValueError(
                f"{folder} holds features of {manifest['alignment_model']}, and alignment_model {name} is another "
                f"encoder ({'; '.join(found)})."
            )


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
