"""Encode pixels to the normalized latents of a VAE and decode them, the same in training and in sampling."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..utils.fingerprint import differences, fingerprint
from ..utils.ranges import Range, check_value

#: Where the config of an `AutoencoderKL` has statistics of each channel; they take the place of its shift_factor.
CHANNEL_STATISTICS = ("latents_mean", "latents_std")
#: Values that they may have.
MEANS, DEVIATIONS = Range(-1e9, 1e9), Range(0, 1e9, with_least=False)


class LatentNormalization(NamedTuple):
    """The map from the latents z of a VAE to those that the model sees, (z - shift_factor) * scaling_factor.

    Each is one number, or a list with one for each channel.
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
        """Make this the normalization in the config of a VAE, an `AutoencoderKL` if each channel has its own."""
        config: dict[str, Any] = self._asdict()
        if isinstance(self.scaling_factor, list):
            std = [1 / factor for factor in self.scaling_factor]
            config = {"scaling_factor": 1.0, "latents_mean": self.shift_factor, "latents_std": std}
        elif CHANNEL_STATISTICS[0] in vae.config:
            config |= dict.fromkeys(CHANNEL_STATISTICS)
        vae.register_to_config(**config)

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


def vae_spatial_scale(vae: nn.Module | None) -> int:
    """Return the pixels per latent along a side: 1 without a VAE."""
    if vae is None:
        return 1
    if "block_out_channels" in vae.config:  # AutoencoderKL
        return 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.spatial_compression_ratio  # AutoencoderDC


@torch.no_grad()
def posterior_moments(vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return mean and standard deviation of the latents of pixels, before the normalization.

    Args:
        vae: An `AutoencoderKL`, or an `AutoencoderDC`, whose latents have the standard deviation 0.
        pixels: In -1 to 1, shape (batch, channels, height, width).

    Returns:
        In fp32, shape (batch, 2, latent_channels, height / scale, width / scale).
    """
    encoded = vae.encode(pixels.to(vae.dtype))  # latents (B, C, H/s, W/s)
    if hasattr(encoded, "latent_dist"):
        moments = (encoded.latent_dist.mean, encoded.latent_dist.std)
    else:
        moments = (encoded.latent, torch.zeros_like(encoded.latent))
    return torch.stack(moments, dim=1).float()  # (B, 2, C, H/s, W/s)


def sample_posterior(
    moments: torch.Tensor, noise: torch.Tensor | None, normalization: LatentNormalization
) -> torch.Tensor:
    """Return normalized latents, drawn with the given noise.

    Args:
        moments: Mean and standard deviation, shape (batch, 2, channels, height, width); see `posterior_moments`.
        noise: Standard normal, shape (batch, channels, height, width); `None` for the mean.
        normalization: The normalization.

    Returns:
        In fp32, shape (batch, channels, height, width).
    """
    mean, std = moments.float().unbind(dim=1)  # 2 x (B, C, H, W)
    return normalization.apply(mean if noise is None else mean + std * noise)


def encode_pixels(vae: nn.Module, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Encode pixels in -1 to 1 to normalized latents: the posterior's mean, or a sample with the given noise."""
    return sample_posterior(posterior_moments(vae, pixels), noise, LatentNormalization.of(vae))


def decode_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Decode normalized latents to pixels in -1 to 1."""
    return decode_raw_latents(vae, LatentNormalization.of(vae).undo(latents))


def decode_raw_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents, as the VAE encodes them, to pixels in -1 to 1."""
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()  # (B, channels, s H, s W)


def check_images_fit(vae: nn.Module, resolution: int, image_mode: str) -> None:
    """Refuse images that the VAE cannot encode.

    Raises:
        ValueError: If it cannot; names the argument to change.
    """
    scale, channels = vae_spatial_scale(vae), vae.config.in_channels
    if resolution % scale:
        raise ValueError(f"resolution {resolution} is not divisible by the VAE's factor {scale}.")
    if channels != len(image_mode):
        raise ValueError(
            f"The VAE takes {channels} channel(s), and images of image_mode {image_mode} have {len(image_mode)}."
        )


def latent_shape(vae: nn.Module, resolution: int) -> tuple[int, int, int]:
    """Return channels, height and width of the latents of square images."""
    side = resolution // vae_spatial_scale(vae)
    return vae.config.latent_channels, side, side


def describe_vae(vae: nn.Module) -> dict[str, str]:
    """Return what identifies a VAE: its class, its config without the normalization, and its weights."""
    config = {
        key: value
        for key, value in vae.config.items()
        if not key.startswith("_") and key not in LatentNormalization._fields
    }
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
