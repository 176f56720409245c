"""Patch features of frozen vision encoders, with which a diffusion transformer may be aligned."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..sdt_h import auto_classes  # noqa: F401 (registers SDT-H with the Auto classes)
from ..utils.fingerprint import fingerprint
from ..utils.pretrained import brief, load_network, load_pretrained
from ..utils.ranges import CheckedArguments, between


@dataclass(frozen=True)
class EncoderArguments(CheckedArguments):
    """Whose features to align with."""

    alignment_model: str | None = field(
        default=None,
        metadata={"help": "Vision encoder of transformers, such as a DINOv2: a folder or a name on the Hub."},
    )
    alignment_resolution: int | None = field(
        default=None,
        metadata={"help": "Side in pixels that it sees images at. Default: its image processor's."} | between(1, 8192),
    )
    alignment_layer: int | None = field(
        default=None,
        metadata={"help": "Which of its hidden states, from 0; -2 is the last but one. Default: its output."}
        | between(-1000, 1000),
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("alignment_resolution", "alignment_layer"):
            if self.alignment_model is None and getattr(self, name) is not None:
                raise ValueError(f"{name} needs alignment_model.")

    def load(self) -> "PatchEncoder | None":
        """Load the encoder, if there is one; same errors."""
        if self.alignment_model is None:
            return None
        return PatchEncoder(self.alignment_model, self.alignment_resolution, self.alignment_layer)


class ImagesWithFeatures(NamedTuple):
    """What a cache holds of an image, or of a batch of them.

    Attributes:
        images: See `LatentCache`.
        features: Patch features, shape (..., height, width, channels).
    """

    images: torch.Tensor
    features: torch.Tensor


class PatchEncoder(nn.Module):
    """A frozen vision encoder of transformers, or an SDT-H, that gives features of an image's patches.

    Images are resized as a whole, so that patches stay where they are in the image: the crop of the encoder's image
    processor is left out.

    Args:
        name: Folder or Hub name of what `AutoModel` loads, with its image processor. Of a model of images and texts,
            such as CLIP, it is the model of images.
        resolution: Side in pixels to which images are resized; that of the image processor by default.
        layer: Index of the hidden states that are taken; the last layer's output, normalized, by default.

    Attributes:
        feature_shape: Height, width and channels of an image's features.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is damaged, cannot take such images, or gives no grid of tokens.
    """

    def __init__(self, name: str, resolution: int | None = None, layer: int | None = None):
        from transformers import AutoImageProcessor, AutoModel

        super().__init__()
        self.name, self.layer = name, layer
        network = load_network(AutoModel, name, "a vision encoder", may_lack=("pooler.",))
        self.network = getattr(network, "vision_model", network)
        if any(key.startswith("pooler.") for key in self.network.state_dict()):
            self.network.pooler = None  # of the class token; some checkpoints lack it
        processor = load_pretrained(AutoImageProcessor, name, "an image processor").to_dict()
        self.resolution = resolution or _side_of(processor, name)
        self.num_channels = getattr(self.network.config, "num_channels", 3)
        self.resample = "bilinear" if processor.get("resample") == Image.Resampling.BILINEAR else "bicubic"
        mean, std, largest = _normalization_of(processor, self.num_channels, name)
        self.largest = largest
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval().requires_grad_(False)
        try:
            features = self(torch.zeros(1, self.num_channels, self.resolution, self.resolution))
        except Exception as error:  # every network raises its own
            raise ValueError(
                f"alignment_model: {name} gives no features of patches for images of {self.resolution} pixels "
                f"({brief(error)}); give another alignment_resolution, alignment_layer or alignment_model."
            ) from error
        self.feature_shape: tuple[int, int, int] = tuple(features.shape[1:])

    def settings(self) -> dict[str, Any]:
        """Return what features depend on besides the images, wherever the encoder lies."""
        normalization = [self.mean.flatten().tolist(), self.std.flatten().tolist(), self.largest, self.resample]
        return {
            "alignment_fingerprint": fingerprint(self.network),
            "alignment_resolution": self.resolution,
            "alignment_layer": self.layer,
            "alignment_normalization": normalization,
        }

    def check_channels(self, num_channels: int) -> None:
        """Refuse images of colors for an encoder of gray ones.

        Raises:
            ValueError: Names the encoder.
        """
        if num_channels not in (1, self.num_channels):
            raise ValueError(
                f"alignment_model: {self.name} takes images of {self.num_channels} channels, not {num_channels}."
            )

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features of images.

        Args:
            pixels: In -1 to 1, gray or color, shape (batch, channels, height, width).

        Returns:
            Shape (batch, *feature_shape), fp32.

        Raises:
            ValueError: If the images have colors and the encoder takes gray ones, or its tokens make no grid.
        """
        options = {}
        if self.layer is not None:
            options["output_hidden_states"] = True
        if "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters:
            options["interpolate_pos_encoding"] = True
        output = self.network(self.prepare(pixels), **options)
        tokens = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        return self._on_grid(tokens).float()

    def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the images resized and normalized, shape (batch, num_channels, resolution, resolution)."""
        self.check_channels(pixels.shape[1])
        values = ((pixels.float() + 1) / 2).expand(-1, self.num_channels, -1, -1)  # 0 to 1
        sides = (self.resolution, self.resolution)
        if values.shape[2:] != sides:
            values = F.interpolate(values, sides, mode=self.resample, antialias=True).clamp(0, 1)
        return (values * self.largest - self.mean) / self.std

    def _on_grid(self, tokens):
        """Return tokens (B, N, D) without those of no patch, or a feature map (B, D, h, w), as (B, h, w, D)."""
        if tokens.ndim == 4:
            return tokens.permute(0, 2, 3, 1)
        config, count = self.network.config, tokens.shape[1]
        patch_size = getattr(config, "patch_size", None)
        side = self.resolution // patch_size if isinstance(patch_size, int) else 0
        # In front of the patches there may be a class token, and registers or a token of distillation.
        further = {0, 1, 2, 1 + (getattr(config, "num_register_tokens", None) or 0)}
        if not side or count - side**2 not in further:
            side = math.isqrt(count)  # a network that merges patches says nothing of its last grid
            if side**2 != count:
                raise ValueError(f"its {count} tokens for {self.resolution} pixels make no square grid")
        return tokens[:, count - side**2 :].unflatten(1, (side, side))


def _side_of(processor, name):
    """Return the side of the squares that an image processor makes."""
    size = processor.get("crop_size" if processor.get("do_center_crop") else "size") or {}
    sides = {size[key] for key in ("height", "width", "shortest_edge") if size.get(key)}
    if len(sides) != 1:
        raise ValueError(
            f"alignment_model: the image processor of {name} makes no squares: give alignment_resolution."
        )
    return sides.pop()


def _normalization_of(processor, num_channels, name):
    """Return mean and deviation, shape (channels, 1, 1), and the largest value of a pixel before they apply."""
    largest = 255 * processor["rescale_factor"] if processor.get("do_rescale") else 255.0
    mean, std = [0.0], [1.0]
    if processor.get("do_normalize"):
        mean, std = processor["image_mean"], processor["image_std"]
    if {len(mean), len(std)} - {1, num_channels} or not all(value > 0 for value in std):
        raise ValueError(
            f"alignment_model: image_mean {mean} and image_std {std} of the image processor of {name} do not fit "
            f"images of {num_channels} channels."
        )
    return *(torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (mean, std)), largest
