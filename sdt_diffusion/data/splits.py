"""The images to train a classifier on, and the images to test it on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..utils.files import local_path
from ..utils.ranges import RANGE_KEY, CheckedArguments, between, check_number
from ..utils.reading import shortened
from ..utils.seeding import Stream, numpy_generator
from .decoding import check_class_folders
from .images import SPLIT_FOLDERS, DataArguments, LabeledImages, load_images, means_digits

#: Seed of the images that are held out; not the run's seed, so that runs of different seeds can be compared.
HELD_OUT_SEED = 0
#: Part of every class that may be held out.
FRACTIONS = between(0, 1, with_least=False, with_most=False)


@dataclass
class ValidationDataArguments(CheckedArguments):
    """What to test on. Without a data set or split for it, a fixed part of each class is held out of training."""

    validation_dataset: str | None = field(
        default=None, metadata={"help": "Data set to test on, as --dataset; the same one by default."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to test on; 'validation', or all of a folder without splits, by default."},
    )
    validation_fraction: float = field(
        default=0.2,
        metadata={"help": "Without either: part of every class that is held out, the same for all seeds."} | FRACTIONS,
    )


class ImageSubset(Dataset):
    """Some of the images of a data set, which keeps its name in messages.

    Args:
        images: The data set, or a part of it.
        indices: Which of them.
    """

    def __init__(self, images: Any, indices: Sequence[int] | np.ndarray):
        self.images, self.indices = images, np.asarray(indices)

    @property
    def name(self) -> str:
        """Name of the data set in messages."""
        return self.images.name

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.images.num_classes

    @property
    def labels(self) -> np.ndarray:
        """Label of each image."""
        return self.images.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """Return images and labels, read together."""
        return self.images.__getitems__([int(self.indices[index]) for index in indices])


def load_splits(
    data: DataArguments, validation: ValidationDataArguments, default_resolution: int
) -> tuple[LabeledImages, LabeledImages | ImageSubset, LabeledImages | ImageSubset]:
    """Open the pictures to train and to test on.

    Args:
        data: The data to train on; `arguments` of the images returned has the values that it does not set.
        validation: The data to test on.
        default_resolution: See `load_images`.

    Returns:
        The data set that names the classes, and its images to train on and to test on.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a class has no images, or the classes of the two differ; see also `load_images`.
    """
    images = load_images(data, default_resolution, as_pictures=True)
    check_class_folders(local_path(data.dataset), images.stored_class_names)
    without = [name for label, name in enumerate(images.class_names) if not (images.labels == label).any()]
    if without:
        raise ValueError(
            f"{images.name} (split {data.dataset_split!r}) has no image of the class(es) {_quoted(without)}: add "
            "some, or drop them."
        )
    if validation.validation_dataset is None and validation.validation_split is None:
        train, held_out = stratified_split(images.labels, validation.validation_fraction)
        if not len(held_out):
            raise ValueError(
                f"{images.name} is too small for validation_fraction {validation.validation_fraction}: no class "
                "has enough images to hold one out. Raise it, or give validation_dataset or validation_split."
            )
        return images, ImageSubset(images, train), ImageSubset(images, held_out)

    other = dataclasses.replace(
        images.arguments,
        dataset=validation.validation_dataset or data.dataset,
        dataset_split=validation.validation_split or _validation_split(validation.validation_dataset),
    )
    same_split = other.dataset_split == data.dataset_split or not _has_splits(data.dataset)
    if other.dataset == data.dataset and same_split:
        raise ValueError(
            f"validation_dataset and validation_split name the images of {data.dataset} that are trained on: give "
            "others, or neither to hold out a part of each class."
        )
    tested = load_images(other, default_resolution, as_pictures=True)
    check_class_folders(local_path(other.dataset), tested.stored_class_names)
    check_same_classes(images, tested)
    return images, images, tested


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and the rows to hold out: `fraction` of every class, always the same ones."""
    check_number("fraction", fraction, FRACTIONS[RANGE_KEY])
    of_classes = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen = numpy_generator(Stream.HELD_OUT, HELD_OUT_SEED, int(label)).permutation(rows)
        of_classes.append(chosen[: min(round(fraction * len(rows)), len(rows) - 1)])
    held_out = np.sort(np.concatenate(of_classes))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def take_samples(images: Any, max_train_samples: int | None, seed: int) -> Any:
    """Return some images of a data set, of every class equally many as far as it has them.

    The images of a smaller number are among those of a larger one.

    Args:
        images: A data set with `labels`.
        max_train_samples: How many; `None` for all.
        seed: Seed of the run.

    Raises:
        ValueError: If there are fewer images, or more classes.
    """
    if max_train_samples is None:
        return images
    labels = np.asarray(images.labels)
    classes = np.unique(labels)
    if not len(classes) <= max_train_samples <= len(labels):
        raise ValueError(
            f"max_train_samples must be {len(classes)}, the number of classes, to {len(labels)}, that of images of "
            f"{images.name} to train on, not {max_train_samples}."
        )
    rank = np.empty(len(labels), dtype=int)  # an image's number among those of its class
    for label in classes:
        rows = np.flatnonzero(labels == label)
        rank[numpy_generator(Stream.TRAINING_SAMPLES, seed, int(label)).permutation(rows)] = np.arange(len(rows))
    return ImageSubset(images, np.sort(np.lexsort((labels, rank))[:max_train_samples]))


def check_same_classes(images: LabeledImages, tested: LabeledImages) -> None:
    """Refuse test data whose labels mean other classes.

    Raises:
        ValueError: If they do; names the classes that differ, or the first label beyond the trained ones.
    """
    if tested.class_names == images.class_names:
        return
    numbers = [str(label) for label in range(max(images.num_classes, tested.num_classes))]
    if images.class_names + tested.class_names == numbers[: images.num_classes] + numbers[: tested.num_classes]:
        # Numbers instead of names: the test data may lack the last classes, but must not have more.
        if tested.num_classes > images.num_classes:
            row = int(np.flatnonzero(tested.labels >= images.num_classes)[0])
            raise ValueError(
                f"{tested.name}, row {row}: label {tested.labels[row]} is beyond the {images.num_classes} classes of "
                f"{images.name}, whose labels are 0..{images.num_classes - 1}."
            )
        return
    missing = [name for name in images.class_names if name not in tested.class_names]
    unknown = [name for name in tested.class_names if name not in images.class_names]
    difference = [
        *([f"{_quoted(missing)} only in {images.name}"] if missing else []),
        *([f"{_quoted(unknown)} only in {tested.name}"] if unknown else []),
    ]
    raise ValueError(
        f"The class names of {images.name} and {tested.name} differ: {'; '.join(difference) or 'another order'}. The "
        "same label must mean the same class."
    )


def _has_splits(name):
    path = local_path(name)
    return not (means_digits(name) or path.is_file() or (path / "dataset_info.json").is_file())


def _validation_split(name):
    """Return the split to test on; a folder of class folders is one split, which `datasets` calls "train"."""
    root = local_path(name)
    has_folder = any((root / folder).is_dir() for folder in SPLIT_FOLDERS["validation"])
    return "train" if root.is_dir() and not has_folder else "validation"


def _quoted(names):
    return shortened(map(repr, names), 10)
