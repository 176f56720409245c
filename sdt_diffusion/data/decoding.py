"""Find image files in folders, decode images to tensors or pictures, and read names of classes."""

import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from ..utils.files import local_path
from ..utils.ranges import RANGE_KEY, between, check_value
from ..utils.reading import read_json, read_text, shortened

#: Endings of image files.
IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
#: Color or gray, as Pillow names them.
ImageMode = Literal["RGB", "L"]
#: Channels of images -> their mode.
IMAGE_MODES: dict[int, ImageMode] = {1: "L", 3: "RGB"}
#: Sides in pixels of the squares that images are cropped to.
RESOLUTIONS = between(1, 8192)
#: Pixels of an image, which Pillow limits too, so that a small file cannot fill the memory.
MAX_PIXELS = 178_956_970
#: Short side in pixels that transforms of pictures are assumed to resize to, where nothing says it.
PICTURE_RESOLUTION = 512
#: Folders of a data set; links to folders can describe any number of them.
MAX_FOLDERS = 1_000_000


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
        check_resolution(resolution)
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
        except MemoryError:
            raise
        except UnidentifiedImageError:
            problem = "Pillow does not know its format"
        except Exception as error:
            problem = str(error) if any(image.values()) else "the row has no image"
        path = f" ({image['path']})" if image.get("path") else ""
        raise CorruptImageError(f"Cannot read the image of row {row}{path} of {dataset}: {problem}")

    def _decode(self, source: io.BytesIO | str) -> torch.Tensor | Image.Image:
        if isinstance(source, str) and Path(source).exists() and not Path(source).is_file():
            raise ValueError("it is not a file")  # a named pipe would be waited for
        with Image.open(source) as opened:
            check_bit_depth(opened)
            picture = opened.convert(self.image_mode)
        if self.as_pictures or self.resolution is None:
            resized_size(picture, self.resolution or PICTURE_RESOLUTION)
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


def check_resolution(resolution: int | None) -> None:
    """Refuse a side in pixels that is not in `RESOLUTIONS`; `None` passes.

    Raises:
        ValueError: Says what is allowed.
    """
    if resolution is not None:
        check_value("resolution", resolution, (int,), RESOLUTIONS[RANGE_KEY])


def resized_size(image: Image.Image, size: int) -> tuple[int, int]:
    """Return width and height of an image after its short side is resized to `size`.

    Raises:
        ValueError: If they are more than `MAX_PIXELS`, as those of a line of pixels are.
    """
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it has {image.width}x{image.height} pixels, and would have {width}x{height} when its short side is "
            f"resized to {size}; crop it"
        )
    return width, height


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop a square as ADM does: halve while twice as large, resize the short side bicubically, crop the center.

    Raises:
        ValueError: If the resized image were too large; see `resized_size`.
    """
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize(resized_size(image, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def is_image(name: str) -> bool:
    """Return whether a file has an ending of image files."""
    return Path(name).suffix.lower() in IMAGE_ENDINGS


def walk_folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and every folder below it, each with the names of its files.

    Links to folders are followed, since the classes of a data set may lie on several disks. Hidden folders are left
    out, and so are pipes, sockets and devices.

    Raises:
        ValueError: If a link leads to a folder above it, or there are more than `MAX_FOLDERS`.
        OSError: If a folder cannot be read.
    """
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    count = 0
    while waiting:
        path, above = waiting.pop()
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise ValueError(f"{path} is a link to a folder above it, whose images would be read over and over.")
        count += 1
        if count > MAX_FOLDERS:
            raise ValueError(f"{folder} has more than {MAX_FOLDERS:,} folders below it.")
        with os.scandir(path) as entries:
            found = list(entries)
        yield path, [entry.name for entry in found if entry.is_file()]
        folders = sorted(entry.name for entry in found if entry.is_dir() and not entry.name.startswith("."))
        waiting += [(path / name, above | {identity}) for name in reversed(folders)]


def check_class_folders(folder: Path, class_names: Sequence[str]) -> None:
    """Refuse empty folders beside those of classes: `datasets` skips them, and later labels would be one too low.

    Other folders, such as the Hub's `data/` of parquet files, are not checked.

    Args:
        folder: The data set's folder; nothing is checked where there is none.
        class_names: Names of the class folders, `stored_class_names` of the images.

    Raises:
        ValueError: If there are any; names them.
    """
    if not folder.is_dir():
        return
    holding = {path for path, names in walk_folders(folder) if any(map(is_image, names))}
    class_folders = {path for path in holding if path != folder and path.name in class_names}
    beside = {path for parent in {path.parent for path in class_folders} for path in parent.iterdir() if path.is_dir()}
    above = {other for path in holding for other in path.parents}
    empty = [str(path) for path in sorted(beside - holding - above) if not path.name.startswith(".")]
    if empty:
        raise ValueError(
            f"{len(empty)} class folder(s) without an image: {shortened(map(repr, empty), 20)}. Fill or remove them."
        )


def read_class_names(path: Path) -> dict[str, str]:
    """Read a file of class names.

    Args:
        path: A `.json` file, either of `{"n01440764": "tench, Tinca tinca"}` or, as torchvision's
            imagenet_class_index.json, of `{"0": ["n01440764", "tench"]}`; or a text file of lines
            `n01440764 tench, Tinca tinca`.

    Returns:
        The data set's own name of a class, such as a folder or a number -> its readable name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"class_names: there is no file {path}.")
    try:
        return _names_of_json(path) if path.suffix.lower() == ".json" else _names_of_lines(path)
    except ValueError as error:
        raise ValueError(f"class_names: {error}") from error


def _names_of_json(path):
    names = {}
    for key, value in read_json(path).items():
        if isinstance(value, str):
            names[key] = value
        elif isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            names[key] = names[value[0]] = value[1]
        else:
            raise ValueError(f"{path}: {key!r} has neither a name nor a pair of folder and name, but {value!r:.60}")
    return names


def _names_of_lines(path):
    names = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        parts = line.split(maxsplit=1)
        if len(parts) == 1:
            raise ValueError(f"{path}: line {number}, {line!r:.60}, has no name")
        if parts:
            names[parts[0]] = parts[1].strip()
    return names


def rename_classes(stored: Sequence[str], path: str | None, dataset: str) -> list[str]:
    """Return the names that a file of class names gives to classes.

    Args:
        stored: The data set's own names.
        path: The file; see `read_class_names`. Without one the names stay.
        dataset: Name of the data set in messages.

    Returns:
        The names in the order of `stored`. A name of several classes, such as ImageNet's two cranes, is
        followed by the data set's own name: "crane (n02012849)".

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read or lacks classes; names them.
    """
    if path is None:
        return list(stored)
    names = read_class_names(local_path(path))
    missing = [name for name in stored if name not in names]
    if missing:
        raise ValueError(
            f"class_names: {path} has no name for {len(missing)} class(es) of {dataset}: "
            f"{shortened(map(repr, missing), 10)}."
        )
    renamed = [names[name] for name in stored]
    count = Counter(renamed)
    return [f"{name} ({before})" if count[name] > 1 else name for before, name in zip(stored, renamed, strict=True)]
