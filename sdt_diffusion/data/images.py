"""Labelled images from scikit-learn's digits, a folder, parquet, arrow or tar files, or the Hub."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from .decoding import IMAGE_ENDINGS, ImageDecoder

#: File ending -> reader of the `datasets` library.
FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}


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
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; what the model preset is for by default."}
    )
    image_mode: Literal["RGB", "L"] | None = field(
        default=None, metadata={"help": "Colour or grey; L for digits, RGB for all else by default."}
    )

    def fill_in(self, default_resolution: int | None) -> None:
        """Decides what was left open: side of the images in pixels, and colour or grey."""
        self.resolution = self.resolution or default_resolution
        self.image_mode = self.image_mode or default_image_mode(self.dataset)


@dataclass
class DataArguments(ImageArguments):
    """What to train on."""

    random_flip: bool = field(default=False, metadata={"help": "Mirror every other image."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load images."})


class LabelledImages:
    """Images decoded on access, with their labels: cropped to a square, as float tensors in -1 to 1, or as pictures.

    Args:
        dataset: A `datasets.Dataset`.
        image_column: Column of type `datasets.Image`.
        label_column: Column of integers or `datasets.ClassLabel`.
        resolution: Side of the square in pixels; `None` with `as_pictures`.
        image_mode: "RGB" or "L".
        name: What to call the data set in messages.
        as_pictures: Give PIL images of that mode, otherwise as they are, for transforms that crop by themselves.

    Raises:
        ValueError: If the data set is empty or its labels are not 0 to num_classes - 1.
    """

    def __init__(
        self,
        dataset,
        image_column: str,
        label_column: str,
        resolution: int | None,
        image_mode: str,
        name: str,
        as_pictures: bool = False,
    ):
        from datasets import ClassLabel, Image

        if len(dataset) == 0:
            raise ValueError(f"The data set {name} is empty.")
        feature = dataset.features[label_column]
        if not isinstance(feature, ClassLabel) and "string" in feature.dtype:
            dataset = dataset.class_encode_column(label_column)
            feature = dataset.features[label_column]
        self.dataset = dataset.cast_column(image_column, Image(decode=False))  # decoding by hand can name the culprit
        self.image_column, self.label_column, self.name = image_column, label_column, name
        self.image_mode = image_mode
        self.decode = ImageDecoder(resolution, image_mode, as_pictures)
        labels = dataset[label_column][:]
        for row, label in enumerate(labels):
            if not isinstance(label, int):
                raise ValueError(f"{name}, row {row}: {label!r} in column {label_column!r} is no label.")
        self.labels = np.asarray(labels)
        if isinstance(feature, ClassLabel):
            self.class_names = list(feature.names)
        else:
            self.class_names = [str(label) for label in range(int(self.labels.max()) + 1)]
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(outside):
            row = int(outside[0])
            raise ValueError(
                f"{name}, row {row}: label {self.labels[row]} in column {label_column!r} is outside "
                f"0..{self.num_classes - 1}."
            )

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
        """Images, as tensors of shape (channels, resolution, resolution), and labels, read in one go."""
        images = self.dataset[list(indices)][self.image_column]
        return [
            (self.decode(image, index, self.name), int(self.labels[index]))
            for image, index in zip(images, indices, strict=True)
        ]

    def __getitem__(self, index: int) -> tuple[torch.Tensor | Image.Image, int]:
        return self.__getitems__([index])[0]


def default_image_mode(dataset: str) -> Literal["RGB", "L"]:
    """Grey for the digits, colour for all else."""
    return "L" if dataset == "digits" else "RGB"


def load_images(args: ImageArguments, default_resolution: int | None, as_pictures: bool = False) -> LabelledImages:
    """Opens the data set that the arguments name.

    Args:
        args: The arguments, into which the values that they left open are filled.
        default_resolution: Side of the images in pixels where the arguments leave it open.
        as_pictures: See `LabelledImages`.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If nothing can be read there, or the columns cannot be told.
    """
    args.fill_in(default_resolution)
    dataset = read_dataset(args)
    image_column, label_column = find_image_column(dataset, args), find_label_column(dataset, args)
    shape = (args.resolution, args.image_mode)
    return LabelledImages(dataset, image_column, label_column, *shape, args.dataset, as_pictures)


def load_digits_dataset():
    """scikit-learn's 1,797 handwritten digits, 8x8 grey pixels, as a `datasets.Dataset` like any other."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(name) for name in range(10)])})
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target.tolist()}
    return Dataset.from_dict(columns, features=features)


def read_dataset(args: ImageArguments, streaming: bool = False):
    """The `datasets.Dataset` that the arguments name; without a split, the only one there is.

    Args:
        args: The arguments.
        streaming: Give an `IterableDataset`, which reads files as they lie, in passing, without a copy of them.

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
            data_files = [str(file) for file in files]
            return load_dataset(FILE_FORMATS[path.suffix], data_files=data_files, split="train", streaming=streaming)
        if (path / "dataset_info.json").is_file():  # written by Dataset.save_to_disk
            return _streamed(load_from_disk(str(path)), streaming)
        splits = load_dataset(str(path) if path.is_dir() else name, split=split, streaming=streaming)
        if split is not None:
            return splits
        if len(splits) > 1:
            raise ValueError(f"it has the splits {', '.join(splits)}: name one by --dataset_split")
        return next(iter(splits.values()))
    except Exception as error:
        raise ValueError(f"Cannot read the data set {name} (split {split!r}): {error}") from error


def _streamed(dataset, streaming):
    return dataset.to_iterable_dataset() if streaming else dataset


def find_image_column(dataset, args: ImageArguments) -> str:
    """The column of images: the one that the arguments name, or the only one of that type.

    Raises:
        ValueError: If there is none or more than one.
    """
    from datasets import Image as ImageFeature

    return _column(
        dataset, args, args.image_column, "image", "--image_column", lambda _, f: isinstance(f, ImageFeature)
    )


def find_label_column(dataset, args: ImageArguments) -> str:
    """The column of labels: the one that the arguments name, or the only one by its type or name.

    Raises:
        ValueError: If there is none or more than one.
    """
    from datasets import ClassLabel

    return _column(
        dataset,
        args,
        args.label_column,
        "label",
        "--label_column",
        lambda name, f: isinstance(f, ClassLabel) or name in ("label", "labels", "cls", "class"),
    )


def _column(dataset, args, given, role, flag, matches):
    if given is not None:
        if given not in dataset.features:
            raise ValueError(f"{args.dataset} has no column {given!r} ({flag}); it has {sorted(dataset.features)}.")
        return given
    found = [name for name, feature in dataset.features.items() if matches(name, feature)]
    if len(found) != 1:
        raise ValueError(
            f"Cannot tell the {role} column of {args.dataset} ({len(found)} candidates among "
            f"{sorted(dataset.features)}): give {flag}."
            + (" In a folder, labels are the names of subfolders." if role == "label" else "")
        )
    return found[0]


def check_class_folders(folder: Path, class_names: Sequence[str]) -> None:
    """Refuses empty folders beside those of classes: `datasets` leaves them out, and all that follow would be one off.

    Other folders, such as the Hub's `data/` of parquet files, are none of its business.

    Args:
        folder: The data set's; nothing is checked where there is none.
        class_names: Of the data set.

    Raises:
        ValueError: Names them.
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
