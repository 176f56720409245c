"""Open a trained generator of pixels and the images that it is measured on."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..data.images import ImageArguments, load_images
from ..data.splits import ImageSubset
from ..evaluation.fid import FidSamplingArguments
from ..sampling.settings import load_pipeline
from ..sdt import SDTPipeline
from ..training.validation import held_out_order, hold_out


def open_generator(folder: Path, device: torch.device) -> SDTPipeline:
    """Load a pipeline to evaluate.

    Raises:
        ValueError: If it generates latents.
    """
    pipe = load_pipeline(FidSamplingArguments(model=str(folder)), device)
    if pipe.vae is not None:
        raise ValueError(
            "evaluation: resolutions and measures of attention are for models of pixels, and this one has a VAE."
        )
    pipe.transformer.eval()
    return pipe


def held_out_images(config: Mapping[str, Any], side: int) -> ImageSubset:
    """Return the held-out images of a run of train_dit.

    Args:
        config: All arguments of the run.
        side: Side to crop them to, in pixels.

    Raises:
        OSError: If the images do not exist.
        ValueError: If they cannot be used.
    """
    count, other = config["held_out_images"], config["held_out_dataset"]
    images = load_images(
        pick_arguments(ImageArguments, {**config, "resolution": side, "dataset": other or config["dataset"]}), side
    )
    if other is not None:
        return ImageSubset(images, sorted(held_out_order(len(images))[:count]))
    held_out = hold_out(images, count)[1]
    assert held_out is not None  # a study of train_dit has held-out images
    return held_out


def as_they_are(batch: torch.Tensor, draws: Any) -> torch.Tensor:
    """Return pixels, which need no decoding."""
    return batch


def pick_arguments(kind: Callable[..., Any], config: Mapping[str, Any]) -> Any:
    """Return the arguments of one kind out of all of a run."""
    return kind(**{each.name: config[each.name] for each in fields(kind) if each.name in config})  # type: ignore
