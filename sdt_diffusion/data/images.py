"""Labeled images from scikit-learn's digits, a folder, parquet, arrow or tar files, or the Hub."""

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from ..utils.files import check_temporary_folder, local_path
from ..utils.ranges import CheckedArguments, at_least, between
from ..utils.reading import shortened
from .decoding import RESOLUTIONS, ImageDecoder, ImageMode, is_image, rename_classes, walk_folders

#: File ending -> a reader of the `datasets` library, or a function of the files' paths that returns a
#: `datasets.Dataset`. A new format is one line here.
FILE_FORMATS: dict[str, str | Callable[[list[str]], Any]] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
#: Split -> names of the folders that `datasets` takes it from.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
#: More are taken for numbers of the images rather than of classes.
MAX_CLASSES = 100_000

Arguments = TypeVar("Arguments", bound="ImageArguments")


@dataclass
class ImageArguments(CheckedArguments):
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
        default=None,
        metadata={"help": "Side of the images in pixels; what the model preset is for by default."} | RESOLUTIONS,
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
    class_balanced: bool = field(
        default=False, metadata={"help": "Show every class equally often, however many images it has."}
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={
            "help": "Train on this many images, of every class equally many as far as it has them, drawn by --seed; "
            "all by default."
        }
        | at_least(1),
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that load images.", "resumable": True} | between(0, 1024)
    )

    def __post_init__(self):
        super().__post_init__()
        check_temporary_folder(self.dataloader_num_workers)


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
        from datasets import ClassLabel, Value

        self.arguments, name = arguments, arguments.dataset
        if len(dataset) == 0:
            raise ValueError(f"The data set {name} is empty.")
        feature = dataset.features[label_column]
        if not isinstance(feature, (ClassLabel, Value)):  # such as images, which would all be read
            raise ValueError(f"{name}: column {label_column!r} holds {feature!r:.60}, which are not labels.")
        if not isinstance(feature, ClassLabel) and "string" in feature.dtype:
            dataset = dataset.class_encode_column(label_column)
            feature = dataset.features[label_column]
        # Images are decoded here and not by `datasets`, so that an error can name the file.
        self.dataset = as_images(dataset, image_column, name)
        self.image_column, self.label_column = image_column, label_column
        self.image_mode = arguments.image_mode or default_image_mode(name)
        self.decode = ImageDecoder(arguments.resolution, self.image_mode, as_pictures)
        labels = dataset[label_column][:]
        for row, label in enumerate(labels):
            if not isinstance(label, int) or isinstance(label, bool):
                raise ValueError(f"{name}, row {row}: {label!r:.60} in column {label_column!r} is not a label.")
        check_num_classes(len(getattr(feature, "names", ())) or max(labels) + 1, label_column, name)
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
        try:
            images = self.dataset[list(indices)][self.image_column]
        except Exception as error:  # a file of the data set has been damaged
            raise ValueError(f"Cannot read rows {shortened(map(str, indices))} of {self.name}: {error}") from error
        return [
            (self.decode(image, index, self.name), int(self.labels[index]))
            for image, index in zip(images, indices, strict=True)
        ]

    def __getitem__(self, index: int) -> tuple[torch.Tensor | Image.Image, int]:
        return self.__getitems__([index])[0]


def default_image_mode(dataset: str) -> ImageMode:
    """Return gray for the digits, color for all else."""
    return "L" if dataset == "digits" else "RGB"


def means_digits(name: str) -> bool:
    """Return whether the name of a data set means the embedded digits.

    Raises:
        ValueError: If it does, but there is a file or folder of that name too.
    """
    if name == "digits" and Path(name).exists():
        raise ValueError(
            f"'digits' means the digits of scikit-learn, but {Path(name).absolute()} exists too: write ./digits for "
            "it, or rename it, or work in another folder, for scikit-learn's."
        )
    return name == "digits"


def check_num_classes(number: int, label_column: str, dataset: str) -> None:
    """Refuse more classes than `MAX_CLASSES`, before a name is made for each.

    Raises:
        ValueError: Names the column.
    """
    if number > MAX_CLASSES:
        raise ValueError(
            f"{dataset}: column {label_column!r} has {number:,} classes, more than {MAX_CLASSES:,}; if it numbers the "
            "images, give another label_column."
        )


def as_images(dataset, column: str, name: str):
    """Return the data set with a column of images that are not decoded.

    Raises:
        ValueError: If the column holds something else.
    """
    from datasets import Image

    try:
        return dataset.cast_column(column, Image(decode=False))
    except Exception as error:
        raise ValueError(f"{name}: column {column!r} holds no images: {error}") from error


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
    if means_digits(name):
        return _streamed(load_digits_dataset(), streaming)
    if not name:
        raise ValueError("dataset is empty: name a folder, a file or a data set on the Hub.")
    path = local_path(name)
    looks_local = path.suffix in FILE_FORMATS or name.startswith(("/", ".", "~"))
    files = [path] if path.exists() else sorted(path.parent.glob(path.name))
    if looks_local and not files:
        raise FileNotFoundError(f"There is no file or folder {path}; give an existing path or a name on the Hub.")
    no_files = [str(file) for file in files if not file.is_file()]
    if no_files and not path.is_dir():
        raise ValueError(f"Cannot read the data set {name}: {shortened(no_files)} is not a file.")
    try:
        if files and files[0].is_file():
            if path.suffix not in FILE_FORMATS:
                raise ValueError(f"{path}: only {', '.join(FILE_FORMATS)} files and folders can be read.")
            reader, data_files = FILE_FORMATS[path.suffix], [glob.escape(str(file)) for file in files]
            if callable(reader):
                return _streamed(reader([str(file) for file in files]), streaming)
            return load_dataset(reader, data_files=data_files, split="train", streaming=streaming)
        if (path / "dataset_info.json").is_file():  # written by Dataset.save_to_disk
            odd = [str(file) for file in path.iterdir() if not (file.is_file() or file.is_dir())]
            if odd:  # a named pipe would be waited for
                raise ValueError(f"{shortened(odd)} is not a file")
            return _streamed(load_from_disk(str(path)), streaming)
        linked = _linked_folders(path) if path.is_dir() else {}
        if linked:
            splits = load_dataset("imagefolder", data_files=linked, split=split, streaming=streaming)
        else:
            splits = load_dataset(str(path) if path.is_dir() else name, split=split, streaming=streaming)
        if split is not None:
            return splits
        if len(splits) > 1:
            raise ValueError(f"it has the splits {', '.join(splits)}: name one as dataset_split")
        return next(iter(splits.values()))
    except Exception as error:
        raise ValueError(f"Cannot read the data set {name} (split {split!r}): {error}") from error


def _linked_folders(folder: Path) -> dict[str, list[str]]:
    """Return the split's patterns of image files in a tree with links to folders, which `datasets` does not follow."""
    folders = [(path, any(map(is_image, names))) for path, names in walk_folders(folder)]
    if not any(path.is_symlink() for path, _ in folders[1:]):
        return {}
    patterns: dict[str | None, list[str]] = {}
    for path, has_images in folders:
        if has_images:
            parts = path.relative_to(folder).parts
            split = next((split for split, known in SPLIT_FOLDERS.items() if set(parts) & set(known)), None)
            patterns.setdefault(split, []).append(f"{glob.escape(str(path))}/*")
    # As in `datasets`, folders beside those of splits do not count.
    named = {split: found for split, found in patterns.items() if split is not None}
    return named or ({"train": patterns[None]} if patterns else {})


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
