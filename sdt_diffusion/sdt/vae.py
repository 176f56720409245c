"""Encode pixels to the normalized latents of a VAE and decode them, the same in training and in sampling."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..utils.fingerprint import differences, fingerprint
from ..utils.ranges import Range, check_value

#: Classes of diffusers whose latents images are learned in; see `VAELayout`.
VAE_CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderRAE")
#: Where the config of an `AutoencoderKL` has statistics of each channel; they take the place of its shift_factor.
CHANNEL_STATISTICS = ("latents_mean", "latents_std")
#: Values that they may have.
MEANS, DEVIATIONS = Range(-1e9, 1e9), Range(0, 1e9, with_least=False)


class VAELayout(NamedTuple):
    """What the images and the latents of a VAE are, which each kind of VAE says in its own way.

    Attributes:
        image_channels: Channels of the images.
        latent_channels: Channels of the latents.
        spatial_scale: Pixels per latent along a side.
        num_moments: What encoding gives: 2 for the mean and the standard deviation of a posterior, 1 for the latents.
        resolution: Side of the only images that it takes and makes; `None` for any multiple of `spatial_scale`.
        has_unit_pixels: Whether its pixels lie in 0 to 1, and not in -1 to 1.
        is_normalized: Whether it encodes to normalized latents, and decodes those.
    """

    image_channels: int
    latent_channels: int
    spatial_scale: int
    num_moments: int = 1
    resolution: int | None = None
    has_unit_pixels: bool = False
    is_normalized: bool = False

    @classmethod
    def of(cls, vae: nn.Module) -> "VAELayout":
        """Return the layout that the VAE's config tells.

        Raises:
            ValueError: If it is of another kind than `VAE_CLASSES`, or its latents are not on a grid.
        """
        config = vae.config
        if "encoder_input_size" in config:  # AutoencoderRAE: it resizes images of any size to this one
            if not config.reshape_to_2d:
                raise ValueError("The VAE's reshape_to_2d must be true: the latents have to be on a grid.")
            side = config.encoder_input_size // config.encoder_patch_size
            return cls(
                config.num_channels,
                config.encoder_hidden_size,
                config.patch_size,
                resolution=config.patch_size * side,
                has_unit_pixels=True,
                is_normalized=True,
            )
        if "block_out_channels" in config:  # AutoencoderKL
            scale = 2 ** (len(config.block_out_channels) - 1)
            return cls(config.in_channels, config.latent_channels, scale, num_moments=2)
        if "encoder_qkv_multiscales" in config:  # AutoencoderDC
            return cls(config.in_channels, config.latent_channels, vae.spatial_compression_ratio)
        raise ValueError(f"The VAE must be one of {', '.join(VAE_CLASSES)}, not an {type(vae).__name__}.")


class LatentNormalization(NamedTuple):
    """The map from the latents z of a VAE to those that the model sees, (z - shift_factor) * scaling_factor.

    Each is one number, or a list with one for each channel. That of a VAE which normalizes by itself changes nothing.
    """

    scaling_factor: float | list[float]
    shift_factor: float | list[float] = 0.0

    @classmethod
    def of(cls, vae: nn.Module) -> "LatentNormalization":
        """Return the normalization in the VAE's config.

        Raises:
            ValueError: If that has statistics that are not those of its channels.
        """
        config = vae.config
        if VAELayout.of(vae).is_normalized:
            return cls(1.0)
        mean, std = statistics = [config.get(name) for name in CHANNEL_STATISTICS]
        if mean is None or std is None:
            return cls(config.scaling_factor, config.get("shift_factor") or 0.0)
        for name, values, allowed in zip(CHANNEL_STATISTICS, statistics, (MEANS, DEVIATIONS), strict=True):
            if not isinstance(values, (list, tuple)) or len(values) != config.latent_channels:
                raise ValueError(f"The VAE's {name} must be {config.latent_channels} numbers, not {values!r:.60}.")
            for value in values:
                check_value(f"The VAE's {name}", value, (float,), allowed)
        return cls([config.scaling_factor / deviation for deviation in std], list(mean))

    def register_with(self, vae: nn.Module) -> None:
        """Make this the normalization in the config of a VAE, an `AutoencoderKL` if each channel has its own.

        Raises:
            ValueError: If the VAE normalizes its latents by itself, and this would change them.
        """
        config: dict[str, Any] = self._asdict()
        if VAELayout.of(vae).is_normalized:
            if self != (1, 0):
                raise ValueError(
                    f"An {type(vae).__name__} normalizes its latents by itself: it cannot have the scaling_factor "
                    f"{self.scaling_factor!r:.60} and the shift_factor {self.shift_factor!r:.60} of another VAE."
                )
            return
        if isinstance(self.scaling_factor, list):
            std = [1 / factor for factor in self.scaling_factor]
            config = {"scaling_factor": 1.0, "latents_mean": self.shift_factor, "latents_std": std}
        elif CHANNEL_STATISTICS[0] in vae.config:
            config |= dict.fromkeys(CHANNEL_STATISTICS)
        vae.register_to_config(**{key: value for key, value in config.items() if key in vae.config or value})

    def apply(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents, shape (batch, channels, height, width), as the model sees them."""
        scale, shift = (_along_channels(value, latents) for value in self)
        return (latents - shift) * scale

    def undo(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents, shape (batch, channels, height, width), as the VAE decodes them."""
        scale, shift = (_along_channels(value, latents) for value in self)
        return latents / scale + shift


def _along_channels(value: float | list[float], latents: torch.Tensor) -> Any:
    return latents.new_tensor(value)[:, None, None] if isinstance(value, list) else value  # (C, 1, 1)


def check_normalization(vae: nn.Module) -> None:
    """Refuse statistics that are not of the VAE's latents, and normalized latents that are scaled again.

    Raises:
        ValueError: Names the key of the VAE's config.
    """
    layout = VAELayout.of(vae)
    if not layout.is_normalized:
        if vae.config.get(CHANNEL_STATISTICS[0]) is not None:
            LatentNormalization.of(vae)
        return
    assert layout.resolution is not None
    channels, side = layout.latent_channels, layout.resolution // layout.spatial_scale
    shapes = [(channels, 1, 1), (channels, side, side)]  # of each channel, or of each channel of each place
    for name in CHANNEL_STATISTICS:
        values = vae.config[name]
        if values is not None and np.shape(values) not in ((1,), *shapes, *((1, *shape) for shape in shapes)):
            raise ValueError(f"The VAE's {name} must be of shape {shapes[0]} or {shapes[1]}, not {np.shape(values)}.")
    scale = vae.config.scaling_factor
    check_value("The VAE's scaling_factor", scale, (float,), DEVIATIONS)
    if vae.config.latents_std is not None and scale != 1:
        raise ValueError(
            f"The VAE divides its latents by latents_std, and scaling_factor {scale:g} would scale them again: set "
            "scaling_factor to 1 in its config.json."
        )


def vae_spatial_scale(vae: nn.Module | None) -> int:
    """Return the pixels per latent along a side: 1 without a VAE."""
    return 1 if vae is None else VAELayout.of(vae).spatial_scale


@torch.no_grad()
def posterior_moments(vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return mean and standard deviation of the latents of pixels, before the normalization.

    Args:
        vae: The VAE.
        pixels: In -1 to 1, shape (batch, channels, height, width).

    Returns:
        In fp32, shape (batch, moments, latent_channels, height / scale, width / scale); a VAE without a posterior has
        no standard deviation, and one moment.
    """
    layout = VAELayout.of(vae)
    pixels = (pixels + 1) / 2 if layout.has_unit_pixels else pixels
    encoded = vae.encode(pixels.to(vae.dtype))  # latents (B, C, H/s, W/s)
    if layout.num_moments == 1:
        return encoded.latent[:, None].float()  # (B, 1, C, H/s, W/s)
    posterior = encoded.latent_dist
    return torch.stack((posterior.mean, posterior.std), dim=1).float()  # (B, 2, C, H/s, W/s)


def sample_posterior(
    moments: torch.Tensor, noise: torch.Tensor | None, normalization: LatentNormalization
) -> torch.Tensor:
    """Return normalized latents, drawn with the given noise.

    Args:
        moments: Mean, and standard deviation if there is one, shape (batch, 1 or 2, channels, height, width); see
            `posterior_moments`.
        noise: Standard normal, shape (batch, channels, height, width); `None` for the mean.
        normalization: The normalization.

    Returns:
        In fp32, shape (batch, channels, height, width).
    """
    mean, *std = moments.float().unbind(dim=1)  # each (B, C, H, W)
    return normalization.apply(mean + std[0] * noise if std and noise is not None else mean)


def encode_pixels(vae: nn.Module, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Encode pixels in -1 to 1 to normalized latents: the posterior's mean, or a sample with the given noise."""
    return sample_posterior(posterior_moments(vae, pixels), noise, LatentNormalization.of(vae))


def decode_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Decode normalized latents to pixels in -1 to 1."""
    return decode_raw_latents(vae, LatentNormalization.of(vae).undo(latents))


def decode_raw_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents, as the VAE encodes them, to pixels in -1 to 1."""
    pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()  # (B, channels, s H, s W)
    return 2 * pixels - 1 if VAELayout.of(vae).has_unit_pixels else pixels


def check_images_fit(vae: nn.Module, resolution: int, image_mode: str) -> None:
    """Refuse images that the VAE cannot encode.

    Raises:
        ValueError: If it cannot; names the argument to change.
    """
    layout = VAELayout.of(vae)
    check_normalization(vae)
    if layout.resolution not in (None, resolution):
        raise ValueError(f"resolution {resolution} is not {layout.resolution}, that of all images of the VAE.")
    if resolution % layout.spatial_scale:
        raise ValueError(f"resolution {resolution} is not divisible by the VAE's factor {layout.spatial_scale}.")
    if layout.image_channels != len(image_mode):
        raise ValueError(
            f"The VAE takes {layout.image_channels} channel(s), and images of image_mode {image_mode} have "
            f"{len(image_mode)}."
        )


def check_images_made(vae: nn.Module | None, channels: int, height: int, width: int) -> None:
    """Refuse latents that no VAE decodes, and a size of images that the VAE cannot decode to.

    Args:
        vae: The VAE, or `None` for a model of pixels, which have 1 or 3 channels.
        channels: Channels that the model makes.
        height: Height of the images.
        width: Width of the images.

    Raises:
        ValueError: If there is no VAE for latents, or all its images have another size.
    """
    if vae is None and channels not in (1, 3):
        raise ValueError(
            f"The model makes latents of {channels} channels, and the pipeline has no VAE that decodes them: give it "
            "one, by SDTPipeline.from_pretrained(folder, vae=vae), or take output_type 'latent'."
        )
    side = None if vae is None else VAELayout.of(vae).resolution
    if side is not None and (height, width) != (side, side):
        raise ValueError(f"The VAE makes images of {side}x{side} only, not of {height}x{width}: leave out the size.")


def latent_shape(vae: nn.Module, resolution: int) -> tuple[int, int, int]:
    """Return channels, height and width of the latents of square images."""
    layout = VAELayout.of(vae)
    side = resolution // layout.spatial_scale
    return layout.latent_channels, side, side


def describe_vae(vae: nn.Module) -> dict[str, str]:
    """Return what identifies a VAE: its class, its weights, and its config without a normalization of its latents."""
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    if not VAELayout.of(vae).is_normalized:
        config = {key: value for key, value in config.items() if key not in LatentNormalization._fields}
        config |= {key: None for key in CHANNEL_STATISTICS if key in config}  # as of VAEs without
    return {
        "vae_class": type(vae).__name__,
        "vae_config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        "vae_weights": fingerprint(vae),
    }


def check_vae(vae: nn.Module, folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a VAE that did not make a cache.

    Args:
        vae: The VAE, in fp32.
        folder: The folder of the cache, for messages.
        manifest: The manifest of the cache.

    Raises:
        ValueError: If it is another; says whether class, config or weights differ.
    """
    now = describe_vae(vae)
    found = differences({key: manifest["settings"].get(key) for key in now}, now)
    if found:
        raise ValueError(
            f"The latents of {folder} are of another VAE ({'; '.join(found)}). Its own was {manifest['vae_name']}; "
            "leave out pretrained_vae_model_name_or_path to use that."
        )
