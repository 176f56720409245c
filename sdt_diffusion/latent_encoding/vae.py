"""Whether a VAE fits images or a cache."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from ..data.images import ImageArguments
from ..fingerprint import fingerprint
from ..sdt.latents import LatentNormalisation, vae_spatial_scale
from ..settings import differences


def check_images_fit(vae: nn.Module, images: ImageArguments) -> None:
    """Refuses images that the VAE cannot encode.

    Raises:
        ValueError: Names the argument that would have to be another.
    """
    scale, channels = vae_spatial_scale(vae), vae.config.in_channels
    if images.resolution % scale:
        raise ValueError(f"--resolution {images.resolution} is not divisible by the VAE's factor {scale}.")
    if channels != len(images.image_mode):
        given = len(images.image_mode)
        raise ValueError(f"The VAE takes {channels} channel(s), and --image_mode {images.image_mode} gives {given}.")


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
