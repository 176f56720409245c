"""Images without conversion, for evaluation: from folders, `.npz` files and data sets.

Training crops and converts images. Evaluation does so only when asked to, because resizing or converting images
changes their FID.
"""

import io
import math
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image

from ..utils.files import require_space
from ..utils.ranges import CheckedArguments, Range, check_value
from ..utils.reading import shortened, walk_files
from .decoding import (
    IMAGE_ENDINGS,
    RESOLUTIONS,
    CorruptImageError,
    center_crop,
    check_bit_depth,
    check_resolution,
    is_image,
    local_path,
)
from .images import ImageArguments, as_images, default_image_mode, find_image_column, means_digits, read_dataset


@dataclass
class RawImageArguments(CheckedArguments):
    """How to read the images of a folder or data set."""

    dataset_split: str = field(default="train", metadata={"help": "Split to read of a data set."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found by its type."})
    resolution: int | None = field(
        default=None,
        metadata={"help": "Prepare images as training does: convert them and crop them to squares of this side."}
        | RESOLUTIONS,
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
        check_resolution(resolution)
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
        except MemoryError:
            raise
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
        self.folder = folder
        self._names = sorted(name for name, _ in walk_files(folder) if is_image(name))
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
        super().__init__(name, image_mode, resolution)
        if len(dataset) == 0:
            raise ValueError(f"The data set {name} is empty.")
        self.dataset = as_images(dataset, column, name).select_columns([column])
        self.column = column
        self._size = self[0].shape[1::-1]

    def __len__(self) -> int:
        return len(self.dataset)

    def name_of(self, index: int) -> str:
        """Return row, data set and path of an image."""
        path = (self.dataset[index][self.column] or {}).get("path")
        return f"row {index} of {self.name}" + (f" ({path})" if path else "")

    def _source(self, index):
        image = self.dataset[index][self.column] or {"bytes": None, "path": None}
        if image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        if image["path"] is None or not Path(image["path"]).is_file():  # a named pipe would be waited for
            raise ValueError("the row has no image" if image["path"] is None else "there is no such file")
        return Path(image["path"])


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
        check_value("count", count, (int,), Range(1, 1e9))
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
    """Map an array of an `.npz` file into memory, after checking that it holds plain numbers and lies in the file.

    A compressed array is first unpacked into an unnamed temporary file.

    Raises:
        ValueError: If the file is not a complete `.npz` file or lacks the array, or the array cannot be mapped.
        OSError: If there is no space to unpack it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            if key in names:
                return _map_entry(path, archive, archive.getinfo(f"{key}.npy"))
    except Exception as error:  # zipfile and numpy raise errors of many kinds for damaged files
        if isinstance(error, MemoryError) or getattr(error, "filename", None):
            raise
        first_line = str(error).partition("\n")[0]  # what follows is numpy's advice to trust the file
        raise ValueError(f"{path} is not a complete .npz file with numbers in {key}: {first_line}") from error
    raise ValueError(f"{path} has no array {key}; it has {shortened(names) or 'none'}.")


def _map_entry(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as member:
        shape, order, dtype = _read_npy_header(member)
        num_bytes, found = math.prod(shape) * dtype.itemsize, entry.file_size - member.tell()
        if num_bytes != found:
            raise ValueError(f"it has {found} bytes of data, and {dtype} of shape {shape} has {num_bytes}")
        if num_bytes == 0:
            return np.empty(shape, dtype)
        if entry.compress_type != zipfile.ZIP_STORED:
            require_space(Path(tempfile.gettempdir()), num_bytes, f"Unpacking {path}")
            with tempfile.TemporaryFile() as unpacked:  # the mapping keeps it
                shutil.copyfileobj(member, unpacked)
                unpacked.flush()
                return np.memmap(unpacked, dtype=dtype, mode="r", shape=shape, order=order)
    with path.open("rb") as file:  # the entry's own header has the lengths of its two last fields in bytes 26 to 29
        file.seek(entry.header_offset)
        local = file.read(30)
    own_header = 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    start = entry.header_offset + own_header + entry.file_size - num_bytes
    later = [other.header_offset for other in archive.infolist() if other.header_offset > entry.header_offset]
    if start + num_bytes > min([*later, archive.start_dir]):
        raise ValueError("its data reach into what follows them in the file")
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape, order=order)


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    """Return shape, order and type of an array, and refuse what is not an array of plain numbers."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"it is of version {version} of the .npy format")
    shape, fortran_order, dtype = readers[version](file)  # numpy limits the length of the header
    # Of objects, the file would hold addresses in memory.
    if dtype.hasobject or dtype.names or dtype.itemsize == 0:
        raise ValueError(f"it has the type {dtype}, which is not one of plain numbers")
    if any(size < 0 for size in shape):
        raise ValueError(f"it has the shape {shape}")
    return shape, "F" if fortran_order else "C", dtype


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


def refuse_preparation(args: RawImageArguments, path: Path, allowed: Collection[str] = ()) -> None:
    """Refuse arguments that convert images where nothing is converted.

    Args:
        args: The arguments.
        path: The file that holds images or statistics.
        allowed: Names of arguments that may be given, because they say how to read other images.

    Raises:
        ValueError: If another one is given; names it.
    """
    for key in ("resolution", "image_column", "image_mode"):
        if key not in allowed and getattr(args, key) is not None:
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
    path = local_path(name)
    if path.suffix.lower() == ".npz":
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        refuse_preparation(args, path)
        return NpzImages(path)
    image_mode = args.image_mode or default_image_mode(name)
    if not means_digits(name) and path.is_dir() and not (path / "dataset_info.json").is_file():
        return FolderImages(path, image_mode, args.resolution)
    data_args = ImageArguments(dataset=name, dataset_split=args.dataset_split, image_column=args.image_column)
    dataset = read_dataset(data_args)
    return DatasetImages(dataset, find_image_column(dataset, data_args), name, image_mode, args.resolution)
