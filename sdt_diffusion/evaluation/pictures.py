"""Pictures as the image processor of a classifier makes them, and back."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.decoding import IMAGE_MODES


def image_mode_for(num_channels: int) -> str:
    """The mode that images are converted to for so many channels.

    Raises:
        ValueError: If there is none.
    """
    if num_channels not in IMAGE_MODES:
        raise ValueError(f"The model takes images of {num_channels} channels; only 1 and 3 can be read.")
    return IMAGE_MODES[num_channels]


def prepare_picture(picture: Image.Image, processor: Any, num_channels: int) -> torch.Tensor:
    """A picture as the model's image processor makes it, shape (num_channels, height, width).

    Raises:
        ValueError: If the processor makes another number of channels.
    """
    if num_channels == 3:
        pixel_values = processor(picture, return_tensors="pt")["pixel_values"][0]
    else:  # processors have several ideas of what a grey PIL image is
        pixels = np.array(picture)[:, :, None]
        pixel_values = processor(pixels, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
    if len(pixel_values) != num_channels:
        raise ValueError(
            f"The image processor makes {len(pixel_values)} channels, but the model takes {num_channels}: give "
            "image_mean and image_std as many values in preprocessor_config.json."
        )
    return pixel_values


def undo_normalisation(pixel_values: torch.Tensor, processor: Any) -> Image.Image:
    """The picture that a prepared one was before its colours were normalised."""
    pixels = pixel_values.float().cpu()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    pixels = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.squeeze())
