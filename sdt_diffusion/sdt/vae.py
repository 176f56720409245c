"""Between pixels and a VAE's latents, normalised the same in training and in decoding."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..utils.fingerprint import differences, fingerprint


class LatentNormalisation(NamedTuple):
    """Between the latents z of a VAE and those that the model sees, (z - shift_factor) * scaling_factor."""

    scaling_factor: float
    shift_factor: float = 0.0

    @classmethod
    def of(cls, vae: nn.Module) -> "LatentNormalisation":
        """The one in the VAE's config."""
        return cls(vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0)

    def apply(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the model sees them."""
        return (latents - self.shift_factor) * self.scaling_factor

    def undo(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE decodes them."""
        return latents / self.scaling_factor + self.shift_factor


def vae_spatial_scale(vae: nn.Module | None) -> int:
    """Pixels per latent along a side: 1 without a VAE."""
    if vae is None:
        return 1
    if "block_out_channels" in vae.config:  # AutoencoderKL
        return 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.spatial_compression_ratio  # AutoencoderDC


@torch.no_grad()
def posterior_moments(vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of the latents of pixels, as they are before the normalisation.

    Args:
        vae: An `AutoencoderKL`, or an `AutoencoderDC`, whose latents are certain: their deviation is 0.
        pixels: In -1 to 1, shape (batch, channels, height, width).

    Returns:
        In fp32, shape (batch, 2, latent_channels, height / scale, width / scale).
    """
    encoded = vae.encode(pixels.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        moments = (encoded.latent_dist.mean, encoded.latent_dist.std)
    else:
        moments = (encoded.latent, torch.zeros_like(encoded.latent))
    return torch.stack(moments, dim=1).float()


def sample_posterior(
    moments: torch.Tensor, noise: torch.Tensor | None, normalisation: LatentNormalisation
) -> torch.Tensor:
    """Normalised latents, drawn with given noise.

    Args:
        moments: Mean and standard deviation, shape (batch, 2, channels, height, width); see `posterior_moments`.
        noise: Standard normal, shape (batch, channels, height, width); `None` for the mean.
        normalisation: The normalisation.

    Returns:
        In fp32, shape (batch, channels, height, width).
    """
    mean, std = moments.float().unbind(dim=1)
    return normalisation.apply(mean if noise is None else mean + std * noise)


def encode_pixels(vae: nn.Module, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Pixels in -1 to 1 to normalised latents: the posterior's mean, or a sample with given noise."""
    return sample_posterior(posterior_moments(vae, pixels), noise, LatentNormalisation.of(vae))


def decode_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents to pixels in -1 to 1."""
    return decode_raw_latents(vae, LatentNormalisation.of(vae).undo(latents))


def decode_raw_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the VAE encodes them to pixels in -1 to 1."""
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()


def check_images_fit(vae: nn.Module, resolution: int, image_mode: str) -> None:
    """Refuses images that the VAE cannot encode.

    Raises:
        ValueError: Names the argument that would have to be another.
    """
    scale, channels = vae_spatial_scale(vae), vae.config.in_channels
    if resolution % scale:
        raise ValueError(f"--resolution {resolution} is not divisible by the VAE's factor {scale}.")
    if channels != len(image_mode):
        given = len(image_mode)
        raise ValueError(f"The VAE takes {channels} channel(s), and --image_mode {image_mode} gives {given}.")


def latent_shape(vae: nn.Module, resolution: int) -> tuple[int, int, int]:
    """Channels, height and width of the latents of square images."""
    side = resolution // vae_spatial_scale(vae)
    return vae.config.latent_channels, side, side


def describe_vae(vae: nn.Module) -> dict[str, str]:
    """By what a VAE is recognised: its class, its config without the normalisation, and its weights in fp32."""
    config = {
        key: value
        for key, value in vae.config.items()
        if not key.startswith("_") and key not in LatentNormalisation._fields
    }
    return {
        "vae_class": type(vae).__name__,
        "vae_config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        "vae_weights": fingerprint(vae),
    }


def check_vae(vae: nn.Module, folder: Path, manifest: dict[str, Any]) -> None:
    """Refuses another VAE than the one of a cache.

    Raises:
        ValueError: Says whether class, config or weights differ.
    """
    now = describe_vae(vae)
    found = differences({key: manifest["settings"].get(key) for key in now}, now)
    if found:
        raise ValueError(
            f"The latents of {folder} are of another VAE ({'; '.join(found)}). Its own was {manifest['vae_name']}; "
            "leave out --pretrained_vae_model_name_or_path to use that."
        )
