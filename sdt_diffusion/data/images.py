"""Labeled images from scikit-learn's digits, a folder, parquet, arrow or tar files, or the Hub."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from .decoding import IMAGE_ENDINGS, ImageDecoder, ImageMode

#: File ending -> a reader of the `datasets` library, or a function of the files' paths that returns a
#: `datasets.Dataset`. A new format is one line here.
FILE_FORMATS: dict[str, str | Callable[[list[str]], Any]] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}

Arguments = TypeVar("Arguments", bound="ImageArguments")


@dataclass
class ImageArguments:
    """Which images to read."""

    dataset: str = field(
        default="digits",
        metadata={
            "help": "'digits' (embedded), an image folder, a .parquet, .arrow or webdataset .tar file, a pattern of "
            "such files, or a name on the Hub; to train_dit.py also a cache of encode_latents.py."
        },
    )
    dataset_split: str | None = field(default="train", metadata={"help": "Split to read."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found by its type."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels; found by its type."})
    class_names: str | None = field(
        default=None,
        metadata={
            "help": "File of readable names for classes such as n01440764: .json as "
            "torchvision's imagenet_class_index.json, or lines 'n01440764 tench, Tinca tinca'."
        },
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; what the model preset is for by default."}
    )
    image_mode: ImageMode | None = field(
        default=None, metadata={"help": "Color or gray; L for digits, RGB for all else by default."}
    )

    def resolved(self: Arguments, default_resolution: int | None) -> Arguments:
        """Return a copy with the resolution and the image mode filled in.

        Args:
            default_resolution: Side of the images in pixels if the arguments do not set it.
        """
        return replace(
            self,
            resolution=self.resolution or default_resolution,
            image_mode=self.image_mode or default_image_mode(self.dataset),
        )

    @property
    def size_and_mode(self) -> tuple[int, ImageMode]:
        """Resolution and image mode of complete arguments; see `resolved`."""
        if self.resolution is None or self.image_mode is None:
            raise ValueError("resolution and image_mode are not decided: use what `resolved` returns.")
        return self.resolution, self.image_mode


@dataclass
class DataArguments(ImageArguments):
    """What to train on."""

    random_flip: bool = field(default=False, metadata={"help": "Mirror every other image."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load images.", "resumable": True})


class LabeledImages:
    """Images with their labels, decoded on access: float tensors in -1 to 1, cropped to a square, or pictures.

    Args:
        dataset: A `datasets.Dataset`.
        image_column: Column of type `datasets.Image`.
        label_column: Column of integers, strings or `datasets.ClassLabel`.
        arguments: The data set's name, resolution, image mode and file of class names; see `ImageArguments.resolved`.
        as_pictures: Return PIL images of that mode, of any size, for transforms that crop by themselves.

    Attributes:
        arguments: The arguments.
        labels: Label of each image, shape (images,).
        class_names: Names of the classes, in the order of the labels.
        stored_class_names: The data set's own names, which differ from `class_names` where a file renames them.

    Raises:
        ValueError: If the data set is empty, its labels are not 0 to num_classes - 1, or a class has no name in the
            file of class names.
    """

    def __init__(
        self, dataset, image_column: str, label_column: str, arguments: ImageArguments, as_pictures: bool = False
    ):
        from datasets import ClassLabel, Image

        self.arguments, name = arguments, arguments.dataset
        if len(dataset) == 0:
            raise ValueError(f"The data set {name} is empty.")
        feature = dataset.features[label_column]
        if not isinstance(feature, ClassLabel) and "string" in feature.dtype:
            dataset = dataset.class_encode_column(label_column)
            feature = dataset.features[label_column]
        # Images are decoded here and not by `datasets`, so that an error can name the file.
        self.dataset = dataset.cast_column(image_column, Image(decode=False))
        self.image_column, self.label_column = image_column, label_column
        self.image_mode = arguments.image_mode or default_image_mode(name)
        self.decode = ImageDecoder(arguments.resolution, self.image_mode, as_pictures)
        labels = dataset[label_column][:]
        for row, label in enumerate(labels):
            if not isinstance(label, int):
                raise ValueError(f"{name}, row {row}: {label!r} in column {label_column!r} is not a label.")
        self.labels = np.asarray(labels)
        if isinstance(feature, ClassLabel):
            self.stored_class_names = list(feature.names)
        else:
            self.stored_class_names = [str(label) for label in range(int(self.labels.max()) + 1)]
        self.class_names = rename_classes(self.stored_class_names, arguments.class_names, name)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(outside):
            row = int(outside[0])
            raise ValueError(
                f"{name}, row {row}: label {self.labels[row]} in column {label_column!r} is outside "
                f"0..{self.num_classes - 1}."
            )

    @property
    def name(self) -> str:
        """Name of the data set in messages."""
        return self.arguments.dataset

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return len(self.image_mode)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor | Image.Image, int]]:
        """Return images and labels, read together; tensors have the shape (channels, resolution, resolution)."""
        images = self.dataset[list(indices)][self.image_column]
        return [
            (self.decode(image, index, self.name), int(self.labels[index]))
            for image, index in zip(images, indices, strict=True)
        ]

    def __getitem__(self, index: int) -> tuple[torch.Tensor | Image.Image, int]:
        return self.__getitems__([index])[0]


def default_image_mode(dataset: str) -> ImageMode:
    """Return gray for the digits, color for all else."""
    return "L" if dataset == "digits" else "RGB"


def load_images(args: ImageArguments, default_resolution: int | None, as_pictures: bool = False) -> LabeledImages:
    """Open the data set that the arguments name.

    Args:
        args: The arguments, which stay as they are; those of the images returned are complete.
        default_resolution: Side of the images in pixels if the arguments do not set it.
        as_pictures: See `LabeledImages`.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If nothing can be read there, or the columns cannot be determined.
    """
    args = args.resolved(default_resolution)
    dataset = read_dataset(args)
    image_column, label_column = find_image_column(dataset, args), find_label_column(dataset, args)
    return LabeledImages(dataset, image_column, label_column, args, as_pictures)


def load_digits_dataset():
    """Return scikit-learn's 1,797 handwritten digits, 8x8 gray pixels, as a `datasets.Dataset`."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(name) for name in range(10)])})
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    return Dataset.from_dict(columns, features=features)


def read_dataset(args: ImageArguments, streaming: bool = False):
    """Return the `datasets.Dataset` that the arguments name; without a split, it must have only one.

    Args:
        args: The arguments.
        streaming: Return an `IterableDataset`, which reads the files in order without copying them first.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If nothing can be read there, or there are several splits and none is named.
    """
    from datasets import load_dataset, load_from_disk

    name, split = args.dataset, args.dataset_split
    if name == "digits":
        return _streamed(load_digits_dataset(), streaming)
    path = Path(name).expanduser()
    looks_local = path.suffix in FILE_FORMATS or name.startswith(("/", ".", "~"))
    files = [path] if path.exists() else sorted(path.parent.glob(path.name))
    if looks_local and not files:
        raise FileNotFoundError(f"There is no file or folder {path}; give an existing path or a name on the Hub.")
    try:
        if files and files[0].is_file():
            if path.suffix not in FILE_FORMATS:
                raise ValueError(f"{path}: only {', '.join(FILE_FORMATS)} files and folders can be read.")
            reader, data_files = FILE_FORMATS[path.suffix], [str(file) for file in files]
            if callable(reader):
                return _streamed(reader(data_files), streaming)
            return load_dataset(reader, data_files=data_files, split="train", streaming=streaming)
        if (path / "dataset_info.json").is_file():  # written by Dataset.save_to_disk
            return _streamed(load_from_disk(str(path)), streaming)
        splits = load_dataset(str(path) if path.is_dir() else name, split=split, streaming=streaming)
        if split is not None:
            return splits
        if len(splits) > 1:
            raise ValueError(f"it has the splits {', '.join(splits)}: name one as dataset_split")
        return next(iter(splits.values()))
    except Exception as error:
        raise ValueError(f"Cannot read the data set {name} (split {split!r}): {error}") from error


def _streamed(dataset, streaming):
    return dataset.to_iterable_dataset() if streaming else dataset


def find_image_column(dataset, args: ImageArguments) -> str:
    """Return the column of images: the one that the arguments name, or the only one of that type.

    Raises:
        ValueError: If there is none or more than one.
    """
    from datasets import Image as ImageFeature

    found = [name for name, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    return _column(dataset, args, "image", found)


def find_label_column(dataset, args: ImageArguments) -> str:
    """Return the column of labels: the one that the arguments name, or the only one by its type or name.

    Raises:
        ValueError: If there is none or more than one.
    """
    from datasets import ClassLabel

    usual = ("label", "labels", "cls", "class")
    found = [name for name, kind in dataset.features.items() if isinstance(kind, ClassLabel) or name in usual]
    return _column(dataset, args, "label", found)


def _column(dataset, args, role, found):
    argument, columns = f"{role}_column", sorted(dataset.features)
    given = getattr(args, argument)
    if given is not None:
        if given not in columns:
            raise ValueError(f"{args.dataset} has no column {given!r} ({argument}); it has {columns}.")
        return given
    if len(found) != 1:
        raise ValueError(
            f"Cannot tell the {role} column of {args.dataset} ({len(found)} candidates among {columns}): give "
            f"{argument}." + (" In a folder, labels are the names of subfolders." if role == "label" else "")
        )
    return found[0]


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
        text = path.read_text(encoding="utf-8")
        return _names_of_json(json.loads(text)) if path.suffix.lower() == ".json" else _names_of_lines(text)
    except ValueError as error:
        raise ValueError(f"class_names: {path} cannot be read: {error}") from error


def _names_of_json(values):
    if not isinstance(values, dict):
        raise ValueError("it does not hold a JSON object")
    names = {}
    for key, value in values.items():
        if isinstance(value, str):
            names[key] = value
        elif isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            names[key] = names[value[0]] = value[1]
        else:
            raise ValueError(f"{key!r} has neither a name nor a pair of folder and name, but {value!r:.60}")
    return names


def _names_of_lines(text):
    names = {}
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split(maxsplit=1)
        if len(parts) == 1:
            raise ValueError(f"line {number}, {line!r:.60}, has no name")
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
    names = read_class_names(Path(path).expanduser())
    missing = [name for name in stored if name not in names]
    if missing:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(
            f"class_names: {path} has no name for {len(missing)} class(es) of {dataset}: "
            f"{', '.join(map(repr, missing[:10]))}{more}."
        )
    renamed = [names[name] for name in stored]
    count = Counter(renamed)
    return [f"{name} ({before})" if count[name] > 1 else name for before, name in zip(stored, renamed, strict=True)]


def check_class_folders(folder: Path, class_names: Sequence[str]) -> None:
    """Refuse empty folders beside those of classes: `datasets` skips them, and later labels would be one too low.

    Other folders, such as the Hub's `data/` of parquet files, are not checked.

    Args:
        folder: The data set's folder; nothing is checked where there is none.
        class_names: Names of the class folders, `stored_class_names` of the images.

    Raises:
        ValueError: If there are any; names them.
    """
    holding = {
        Path(parent)
        for parent, _, names in os.walk(folder, followlinks=True)
        if any(Path(name).suffix.lower() in IMAGE_ENDINGS for name in names)
    }
    class_folders = {path for path in holding if path != folder and path.name in class_names}
    beside = {path for parent in {path.parent for path in class_folders} for path in parent.iterdir() if path.is_dir()}
    above = {other for path in holding for other in path.parents}
    empty = [str(path) for path in sorted(beside - holding - above) if not path.name.startswith(".")]
    if empty:
        more = f" and {len(empty) - 20} more" if len(empty) > 20 else ""
        raise ValueError(
            f"{len(empty)} class folder(s) without an image: {', '.join(map(repr, empty[:20]))}{more}. Fill or remove "
            "them."
        )
