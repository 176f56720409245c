"""Images without conversion, for evaluation: from folders, `.npz` files and data sets.

Training crops and converts images. Evaluation does so only when asked to, because resizing or converting images
changes their FID.
"""

import io
import os
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from .decoding import IMAGE_ENDINGS, CorruptImageError, center_crop, check_bit_depth
from .images import ImageArguments, default_image_mode, find_image_column, read_dataset


@dataclass
class RawImageArguments:
    """How to read the images of a folder or data set."""

    dataset_split: str = field(default="train", metadata={"help": "Split to read of a data set."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found by its type."})
    resolution: int | None = field(
        default=None,
        metadata={"help": "Prepare images as training does: convert them and crop them to squares of this side."},
    )
    image_mode: Literal["RGB", "L"] | None = field(
        default=None, metadata={"help": "Color or gray; L for digits, RGB for all else by default."}
    )


class RawImages(ABC):
    """A sequence of images of one size: arrays of shape (height, width, 1 or 3), uint8."""

    #: Where the images come from, for messages and records.
    name: str
    #: How the images were converted and cropped.
    preparation: str = "none"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> np.ndarray:
        """Return an image.

        Raises:
            CorruptImageError: If it cannot be decoded, or differs from the others in size or mode; names it.
        """

    def name_of(self, index: int) -> str:
        """Return the name of an image in messages."""
        return f"image {index} of {self.name}"

    @property
    def compression(self) -> str:
        """The images' file format, which is recorded because compression changes features."""
        return "none"

    def describe(self) -> dict[str, Any]:
        """Return source, number, shape, file format and preparation of the images."""
        return {
            "images": self.name,
            "count": len(self),
            "shape": list(self[0].shape),
            "format": self.compression,
            "preparation": self.preparation,
        }


class EncodedImages(RawImages):
    """Images in files or in rows of a data set, decoded on access.

    Args:
        name: Name of the images in messages and records.
        image_mode: "RGB" or "L".
        resolution: Convert images to that mode and crop them to squares of this side, as training does; `None` to
            leave them as they are.
    """

    def __init__(self, name: str, image_mode: str, resolution: int | None):
        self.name, self.image_mode, self.resolution = name, image_mode, resolution
        self._size: tuple[int, int] | None = None
        if resolution:
            self.preparation = f"converted to {image_mode}, cropped to {resolution} by ADM's rule"

    @abstractmethod
    def _source(self, index: int) -> Path | io.BytesIO:
        """Return what Pillow opens."""

    @property
    def compression(self) -> str:
        """File format of the first image."""
        with Image.open(self._source(0)) as image:
            return image.format or "none"

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            with Image.open(self._source(index)) as opened:
                self._check(opened)
                image: Image.Image = opened
                if self.resolution:
                    image = center_crop(opened.convert(self.image_mode), self.resolution)
                return np.array(image).reshape(image.height, image.width, len(self.image_mode))  # (H, W, C)
        except Exception as error:
            raise CorruptImageError(f"Cannot use {self.name_of(index)}: {error}") from error

    def _check(self, image):
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"it is an animation of {image.n_frames} frames")
        check_bit_depth(image)
        if self.resolution:
            return
        if "transparency" in image.info:
            raise ValueError("it has a transparent color; convert it, or give a resolution to convert all images")
        if image.mode != self.image_mode:
            raise ValueError(
                f"its mode is {image.mode}, not {self.image_mode}; convert it, or give a resolution to convert and "
                "crop all images as in training" + (", or image_mode L for gray images" if image.mode == "L" else "")
            )
        if self._size is None:
            self._size = image.size
        if image.size != self._size:
            raise ValueError(
                f"it has {image.width}x{image.height} pixels, the first image {self._size[0]}x{self._size[1]}; "
                "resize the images, or give a resolution to crop all images as in training"
            )


class FolderImages(EncodedImages):
    """The image files in a folder and its subfolders, sorted by path.

    Raises:
        ValueError: If there are none.
    """

    def __init__(self, folder: Path, image_mode: str = "RGB", resolution: int | None = None):
        super().__init__(str(folder), image_mode, resolution)
        # rglob does not enter linked folders.
        files = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
        paths = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
        self.folder = folder
        self._names = sorted(path.relative_to(folder).as_posix() for path in paths)
        if not self._names:
            raise ValueError(f"{folder} holds no image ({', '.join(sorted(IMAGE_ENDINGS))}).")
        self._size = self[0].shape[1::-1]

    def __len__(self) -> int:
        return len(self._names)

    @property
    def compression(self) -> str:
        """File formats by the endings of the files."""
        endings = {Path(name).suffix.lower().removeprefix(".").replace("jpg", "jpeg") for name in self._names}
        return ", ".join(sorted(ending.upper() for ending in endings))

    def name_of(self, index: int) -> str:
        """Return the path of an image."""
        return str(self._source(index))

    def _source(self, index):
        return self.folder / self._names[index]


class DatasetImages(EncodedImages):
    """The image column of a `datasets.Dataset`.

    Raises:
        ValueError: If it is empty.
    """

    def __init__(self, dataset, column: str, name: str, image_mode: str = "RGB", resolution: int | None = None):
        from datasets import Image as ImageFeature

        super().__init__(name, image_mode, resolution)
        if len(dataset) == 0:
            raise ValueError(f"The data set {name} is empty.")
        self.dataset = dataset.cast_column(column, ImageFeature(decode=False)).select_columns([column])
        self.column = column
        self._size = self[0].shape[1::-1]

    def __len__(self) -> int:
        return len(self.dataset)

    def name_of(self, index: int) -> str:
        """Return row, data set and path of an image."""
        path = self.dataset[index][self.column]["path"]
        return f"row {index} of {self.name}" + (f" ({path})" if path else "")

    def _source(self, index):
        image = self.dataset[index][self.column]
        return Path(image["path"]) if image["bytes"] is None else io.BytesIO(image["bytes"])


class NpzImages(RawImages):
    """`arr_0` of an `.npz` file in the layout of ADM's evaluation: uint8, shape (n, height, width, 3).

    The array is mapped into memory, not read.

    Raises:
        ValueError: If there is no such array.
    """

    def __init__(self, path: Path):
        self.name = str(path)
        self.array = map_npz_array(path, "arr_0")
        shape = self.array.shape
        if self.array.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            raise ValueError(
                f"{path}: arr_0 has type {self.array.dtype} and shape {shape}; images are uint8 of shape "
                "(n, height, width, 3), or (n, height, width, 1) for gray."
            )

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(self.array[index])


class SubsetImages(RawImages):
    """Some of the images, drawn at random.

    Raises:
        ValueError: If there are fewer images.
    """

    def __init__(self, images: RawImages, count: int, seed: int = 2020):
        if count > len(images):
            raise ValueError(f"{images.name} holds {len(images)} images, not {count}.")
        self.images, self.name = images, images.name
        self.indices = np.sort(np.random.RandomState(seed).choice(len(images), count, replace=False))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[self.indices[index]]

    def name_of(self, index: int) -> str:
        """Return the name of the image in the whole set."""
        return self.images.name_of(self.indices[index])

    def describe(self) -> dict[str, Any]:
        """Return the description of all images, with the number drawn and the number they were drawn from."""
        return {**self.images.describe(), "count": len(self), "drawn_from": len(self.images)}


def map_npz_array(path: Path, key: str) -> np.ndarray:
    """Map an array of an `.npz` file into memory.

    A compressed array is first unpacked into an unnamed temporary file.

    Raises:
        ValueError: If the file is not a complete `.npz` file or lacks the array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            if key not in names:
                raise ValueError(f"{path} has no array {key}; it has {', '.join(names) or 'none'}.")
            entry = archive.getinfo(f"{key}.npy")
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shape, fortran_order, dtype = read_header[version[0]](member)
                header_size = member.tell()
                order: Literal["F", "C"] = "F" if fortran_order else "C"
                if 0 in shape:
                    return np.empty(shape, dtype)
                if entry.compress_type != zipfile.ZIP_STORED:
                    with tempfile.TemporaryFile() as unpacked:  # the mapping keeps it
                        shutil.copyfileobj(member, unpacked)
                        unpacked.flush()
                        return np.memmap(unpacked, dtype=dtype, mode="r", shape=shape, order=order)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is not a complete .npz file: {error}") from error
    with path.open("rb") as file:  # the data follow the entry's own header, whose length is in bytes 26 to 29
        file.seek(entry.header_offset)
        local = file.read(30)
    start = entry.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return np.memmap(path, dtype=dtype, mode="r", offset=start + header_size, shape=shape, order=order)


def save_npz_images(path: Path, images: RawImages) -> None:
    """Write images, one at a time, as `arr_0` of an `.npz`, the layout that ADM's evaluation reads.

    Args:
        path: The file.
        images: The images. Gray ones become RGB, which evaluators expect.
    """
    shape = (*images[0].shape[:2], 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *shape)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for index in range(len(images)):
            member.write(np.broadcast_to(images[index], shape).tobytes())


def refuse_preparation(args: RawImageArguments, path: Path) -> None:
    """Refuse arguments that convert images where nothing is converted.

    Args:
        args: The arguments.
        path: The file that holds images or statistics.

    Raises:
        ValueError: If one of them is given; names it.
    """
    for key in ("resolution", "image_column", "image_mode"):
        if getattr(args, key) is not None:
            raise ValueError(f"{key} has no effect on {path}; leave it out.")


def open_images(name: str, args: RawImageArguments) -> RawImages:
    """Open images by the name of a folder, an `.npz` file or a data set.

    Args:
        name: A folder of images or of `Dataset.save_to_disk`, an `.npz`, `.parquet`, `.arrow` or `.tar` file,
            "digits", or a name on the Hub.
        args: How to read them.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If nothing can be read there.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".npz":
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        refuse_preparation(args, path)
        return NpzImages(path)
    image_mode = args.image_mode or default_image_mode(name)
    if path.is_dir() and not (path / "dataset_info.json").is_file():
        return FolderImages(path, image_mode, args.resolution)
    data_args = ImageArguments(dataset=name, dataset_split=args.dataset_split, image_column=args.image_column)
    dataset = read_dataset(data_args)
    return DatasetImages(dataset, find_image_column(dataset, data_args), name, image_mode, args.resolution)
