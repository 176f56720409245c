"""Between pixels and a VAE's latents, normalised the same in training and in decoding."""

import torch
from torch import nn


def vae_spatial_scale(vae: nn.Module | None) -> int:
    """Pixels per latent along a side: 1 without a VAE."""
    if vae is None:
        return 1
    if "block_out_channels" in vae.config:  # AutoencoderKL
        return 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.spatial_compression_ratio  # AutoencoderDC


@torch.no_grad()
def encode_pixels(vae: nn.Module, pixels: torch.Tensor, sample: bool = True) -> torch.Tensor:
    """Pixels in -1 to 1 to normalised latents, (z - shift_factor) * scaling_factor.

    z is a sample of the posterior, or its mode.
    """
    encoded = vae.encode(pixels.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.sample() if sample else encoded.latent_dist.mode()
    else:
        latents = encoded.latent  # AutoencoderDC
    return (latents.float() - _shift(vae)) * vae.config.scaling_factor


def decode_latents(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents to pixels in -1 to 1."""
    latents = latents / vae.config.scaling_factor + _shift(vae)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()


def _shift(vae):
    return getattr(vae.config, "shift_factor", None) or 0.0
