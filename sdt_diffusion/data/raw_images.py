"""Images as they are, 8 bits a channel, for evaluation: from folders, `.npz` files and data sets.

Training crops and converts what it is given. Evaluation does not, unless it is told to: an image that is silently
resized or converted is another image, and its FID another FID.
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
        default=None, metadata={"help": "Colour or grey; L for digits, RGB for all else by default."}
    )


class RawImages(ABC):
    """A sequence of images of one size: arrays of shape (height, width, 1 or 3), uint8."""

    #: Where they come from, for messages and records.
    name: str
    #: What was done to them.
    preparation: str = "none"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> np.ndarray:
        """An image.

        Raises:
            CorruptImageError: If it is not as all images must be; the message names it.
        """

    def name_of(self, index: int) -> str:
        """What to call an image in a message."""
        return f"image {index} of {self.name}"

    @property
    def compression(self) -> str:
        """The images' file format, where they have one: JPEG's traces are features too."""
        return "none"

    def describe(self) -> dict[str, Any]:
        """Source, number, shape and preparation of the images."""
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
        name: What to call them all.
        image_mode: "RGB" or "L".
        resolution: Convert images to that mode and crop them to squares of this side, as training does; images are
            taken as they are without it.
    """

    def __init__(self, name: str, image_mode: str, resolution: int | None):
        self.name, self.image_mode, self.resolution = name, image_mode, resolution
        self._size: tuple[int, int] | None = None
        if resolution:
            self.preparation = f"converted to {image_mode}, cropped to {resolution} by ADM's rule"

    @abstractmethod
    def _source(self, index: int) -> Path | io.BytesIO:
        """What Pillow opens."""

    @property
    def compression(self) -> str:
        with Image.open(self._source(0)) as image:
            return image.format or "none"

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            with Image.open(self._source(index)) as image:
                self._check(image)
                if self.resolution:
                    image = center_crop(image.convert(self.image_mode), self.resolution)
                return np.array(image).reshape(image.height, image.width, len(self.image_mode))
        except Exception as error:
            raise CorruptImageError(f"Cannot use {self.name_of(index)}: {error}") from error

    def _check(self, image):
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"it is an animation of {image.n_frames} frames")
        check_bit_depth(image)
        if self.resolution:
            return
        if "transparency" in image.info:
            raise ValueError("it has a transparent colour; convert it, or have all images converted by --resolution")
        if image.mode != self.image_mode:
            raise ValueError(
                f"its mode is {image.mode}, not {self.image_mode}; convert it, or have all images converted and "
                "cropped as in training by --resolution"
                + (", or evaluate grey images by --image_mode L" if image.mode == "L" else "")
            )
        if self._size is None:
            self._size = image.size
        if image.size != self._size:
            raise ValueError(
                f"it has {image.width}x{image.height} pixels, the first image {self._size[0]}x{self._size[1]}; "
                "resize the images, or have them cropped as in training by --resolution"
            )


class FolderImages(EncodedImages):
    """The image files in a folder and its subfolders, sorted by path, whatever order the file system lists them in.

    Raises:
        ValueError: If there are none.
    """

    def __init__(self, folder: Path, image_mode: str = "RGB", resolution: int | None = None):
        super().__init__(str(folder), image_mode, resolution)
        # Not rglob, which does not enter linked folders.
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
        endings = {Path(name).suffix.lower().removeprefix(".").replace("jpg", "jpeg") for name in self._names}
        return ", ".join(sorted(ending.upper() for ending in endings))

    def name_of(self, index: int) -> str:
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
        path = self.dataset[index][self.column]["path"]
        return f"row {index} of {self.name}" + (f" ({path})" if path else "")

    def _source(self, index):
        image = self.dataset[index][self.column]
        return Path(image["path"]) if image["bytes"] is None else io.BytesIO(image["bytes"])


class NpzImages(RawImages):
    """`arr_0` of an `.npz` file in the layout of ADM's evaluation: uint8, shape (n, height, width, 3).

    The array is mapped where it lies in the file, not read into memory.

    Raises:
        ValueError: If there is no such array.
    """

    def __init__(self, path: Path):
        self.name = str(path)
        self.array = map_npz_array(path, "arr_0")
        shape = self.array.shape
        if self.array.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
            raise ValueError(
                f"{path}: arr_0 has type {self.array.dtype} and shape {shape}; images are uint8, (n, height, width, "
                "3), or 1 in the end for grey."
            )

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(self.array[index])


class SubsetImages(RawImages):
    """Some of the images, drawn at random.

    Raises:
        ValueError: If there are not as many.
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
        return self.images.name_of(self.indices[index])

    def describe(self) -> dict[str, Any]:
        return {**self.images.describe(), "count": len(self), "drawn_from": len(self.images)}


def map_npz_array(path: Path, key: str) -> np.ndarray:
    """An array of an `.npz` file, mapped into memory where it lies in the file.

    A compressed one is unpacked into a nameless file in the folder for temporary files first.

    Raises:
        ValueError: If the file is no `.npz` or lacks the array.
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
                order = "F" if fortran_order else "C"
                if 0 in shape:
                    return np.empty(shape, dtype)
                if entry.compress_type != zipfile.ZIP_STORED:
                    unpacked = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the mapping)
                    shutil.copyfileobj(member, unpacked)
                    return np.memmap(unpacked, dtype=dtype, mode="r", shape=shape, order=order)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is no whole .npz file: {error}") from error
    with path.open("rb") as file:  # the data follow the entry's own header, whose length is in bytes 26 to 29
        file.seek(entry.header_offset)
        local = file.read(30)
    start = entry.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return np.memmap(path, dtype=dtype, mode="r", offset=start + header_size, shape=shape, order=order)


def save_npz_images(path: Path, images: RawImages) -> None:
    """Writes images as `arr_0` of an `.npz`, the layout that ADM's evaluation reads, one at a time.

    Args:
        path: The file.
        images: The images. Grey becomes RGB, which evaluators expect.
    """
    shape = (*images[0].shape[:2], 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *shape)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for index in range(len(images)):
            member.write(np.broadcast_to(images[index], shape).tobytes())


def refuse_preparation(args: RawImageArguments, what: str) -> None:
    """Refuses flags that change images where these are what they are.

    Raises:
        ValueError: Names the flag.
    """
    for key in ("resolution", "image_column", "image_mode"):
        if getattr(args, key) is not None:
            raise ValueError(f"--{key} does nothing to {what}; leave it out.")


def open_images(name: str, args: RawImageArguments, flag: str) -> RawImages:
    """Images by the name of a folder, an `.npz` file or a data set.

    Args:
        name: A folder of images or of `Dataset.save_to_disk`, an `.npz`, `.parquet`, `.arrow` or `.tar` file,
            "digits", or a name on the Hub.
        args: How to read them.
        flag: Where the name came from, for messages.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If nothing can be read there.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".npz":
        if not path.is_file():
            raise FileNotFoundError(f"{flag}: there is no file {path}.")
        refuse_preparation(args, f"{flag} {path}")
        return NpzImages(path)
    image_mode = args.image_mode or default_image_mode(name)
    if path.is_dir() and not (path / "dataset_info.json").is_file():
        return FolderImages(path, image_mode, args.resolution)
    data_args = ImageArguments(dataset=name, dataset_split=args.dataset_split, image_column=args.image_column)
    dataset = read_dataset(data_args)
    return DatasetImages(dataset, find_image_column(dataset, data_args), name, image_mode, args.resolution)
