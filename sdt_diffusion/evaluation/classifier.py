"""Any image classifier, and pictures as its own image processor makes them."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from .. import classification  # noqa: F401  (lets the Auto classes find this project's classifiers)
from ..data.decoding import IMAGE_MODES
from ..metrics.extractors.transformers_models import load_pretrained


def load_classifier(name: str, dtype: str, device: torch.device) -> tuple[nn.Module, Any]:
    """An image classifier of any architecture that transformers or this project knows, and its image processor.

    Raises:
        FileNotFoundError: If they cannot be loaded.
        ValueError: If weights are missing: transformers would draw them at random, the classifier of a mere backbone.
    """
    how = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    model, info = load_pretrained(AutoModelForImageClassification, name, "an image classifier", **how)
    if info["missing_keys"]:
        raise ValueError(f"{name} has no weights for {', '.join(sorted(info['missing_keys']))[:160]}: is it trained?")
    return model.to(device).eval(), load_pretrained(AutoImageProcessor, name, "an image processor")


def channels_of(model: nn.Module) -> int:
    """Channels of a classifier's images."""
    return getattr(model.config, "num_channels", 3)


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
