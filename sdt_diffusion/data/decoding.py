"""Decode images to tensors or pictures."""

import io
import re
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

#: Endings of image files.
IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
#: Color or gray, as Pillow names them.
ImageMode = Literal["RGB", "L"]
#: Channels of images -> their mode.
IMAGE_MODES: dict[int, ImageMode] = {1: "L", 3: "RGB"}


class CorruptImageError(ValueError):
    """An image of the data set cannot be decoded; the message names it."""


class ImageDecoder:
    """Decodes images as `datasets.Image(decode=False)` returns them, so that an error can name the file.

    Args:
        resolution: Side in pixels of the square that images are cropped to; `None` with `as_pictures`.
        image_mode: "RGB" or "L".
        as_pictures: Return PIL images of that mode, of any size, for transforms that crop by themselves.
    """

    def __init__(self, resolution: int | None, image_mode: ImageMode, as_pictures: bool = False):
        self.resolution, self.image_mode, self.as_pictures = resolution, image_mode, as_pictures

    def __call__(self, image: dict | None, row: int, dataset: str) -> torch.Tensor | Image.Image:
        """Decode one image.

        Args:
            image: Its `bytes`, or the `path` of its file.
            row: Its row in the data set, for messages.
            dataset: Name of the data set, for messages.

        Returns:
            A picture, or a tensor in -1 to 1 of shape (channels, resolution, resolution).

        Raises:
            CorruptImageError: If it cannot be decoded.
        """
        image = image or {"bytes": None, "path": None}
        try:
            return self._decode(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
        except UnidentifiedImageError:
            problem = "Pillow does not know its format"
        except Exception as error:
            problem = str(error) if any(image.values()) else "the row has no image"
        path = f" ({image['path']})" if image.get("path") else ""
        raise CorruptImageError(f"Cannot read the image of row {row}{path} of {dataset}: {problem}")

    def _decode(self, source: io.BytesIO | str) -> torch.Tensor | Image.Image:
        with Image.open(source) as opened:
            check_bit_depth(opened)
            picture = opened.convert(self.image_mode)
        if self.as_pictures or self.resolution is None:
            return picture
        pixels = torch.from_numpy(np.array(center_crop(picture, self.resolution)))  # (H, W) or (H, W, 3)
        pixels = pixels.reshape(self.resolution, self.resolution, len(self.image_mode))  # (H, W, C)
        return pixels.permute(2, 0, 1).float() / 127.5 - 1  # (C, H, W)


def check_bit_depth(image: ImageFile.ImageFile) -> None:
    """Refuse an image of more than 8 bits per channel, of which Pillow would drop the lower bits.

    Args:
        image: As `Image.open` returns it, before its pixels are read.

    Raises:
        ValueError: If it has more; says its mode.
    """
    # Pillow reads colors of 16 bits as RGB; only the layout of the bytes in the file, such as RGB;16B, reveals them.
    if image.mode.startswith(("I", "F")) or any(re.search(";16[BLN]", str(tile)) for tile in image.tile):
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel; convert it to 8 bits")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop a square as ADM does: halve while twice as large, resize the short side bicubically, crop the center."""
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
