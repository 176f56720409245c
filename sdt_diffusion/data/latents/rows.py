"""Read every image of a data set once, in batches that hold the same images for any number of processes."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from ...utils.files import local_path
from ...utils.ranges import Range, check_value
from ..decoding import (
    CorruptImageError,
    ImageDecoder,
    check_class_folders,
    read_class_names,
    rename_classes,
)
from ..images import (
    MAX_CLASSES,
    ImageArguments,
    LabeledImages,
    as_images,
    find_image_column,
    find_label_column,
    load_images,
    read_dataset,
)

#: Batches that are decoded ahead of the one in use.
BATCHES_AHEAD = 3
#: Rows that are read from a table at once.
ROWS_AT_ONCE = 256


class StoredRows:
    """The rows of a data set that are read by their number; those that are not wanted are not read.

    Args:
        images: The data set.
    """

    def __init__(self, images: LabeledImages):
        self.images, self.name, self.num_rows = images, images.name, len(images)
        self.arguments = images.arguments
        self.class_names, self.stored_class_names = images.class_names, images.stored_class_names

    def read(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict, int]]:
        """Iterate over number, encoded image and label of the wanted rows, in order."""
        numbers = [number for number in range(len(self.images)) if wanted(number)]
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            chunk = numbers[start : start + ROWS_AT_ONCE]
            encoded = self.images.dataset[chunk][self.images.image_column]
            yield from zip(chunk, encoded, self.images.labels[chunk].tolist(), strict=True)


class StreamedRows:
    """The rows of a data set that is read in order, such as a tar file; unwanted rows are read but not decoded.

    Args:
        dataset: A `datasets.IterableDataset`.
        image_column: Column of type `datasets.Image`.
        label_column: Column of integers or `datasets.ClassLabel`.
        arguments: The data set's name and file of class names; see `ImageArguments.resolved`.

    Raises:
        ValueError: If the labels are not integers, or a class has no name in the file of class names.
    """

    num_rows: int | None = None  # known after the last row

    def __init__(self, dataset, image_column: str, label_column: str, arguments: ImageArguments):
        from datasets import ClassLabel

        self.arguments, self.name = arguments, arguments.dataset
        feature = dataset.features[label_column]
        if isinstance(feature, ClassLabel):
            self.stored_class_names = list(feature.names)
        elif "int" in str(getattr(feature, "dtype", "")):
            self.stored_class_names = _numbers_in(arguments.class_names)
        else:
            raise ValueError(
                f"{self.name}: the labels in column {label_column!r} are not integers, and the names of all classes "
                "are not known before a stream ends. Leave out streaming, or give another label_column."
            )
        self.class_names = self.stored_class_names and rename_classes(
            self.stored_class_names, arguments.class_names, self.name
        )
        self.dataset = as_images(dataset, image_column, self.name)
        self.image_column, self.label_column = image_column, label_column

    def read(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict, int]]:
        """Iterate over number, encoded image and label of the wanted rows, in order; set `num_rows` at the end.

        Raises:
            ValueError: If a label is invalid, or a row cannot be read.
        """
        rows = enumerate(self.dataset)
        number = -1
        while True:
            try:
                number, row = next(rows)
            except StopIteration:
                self.num_rows = number + 1
                return
            except Exception as error:  # a damaged tar or parquet file
                raise ValueError(f"{self.name}: row {number + 1} cannot be read: {error}") from error
            if wanted(number):
                label = row[self.label_column]
                if not isinstance(label, int) or not 0 <= label < len(self.class_names or range(MAX_CLASSES)):
                    raise ValueError(
                        f"{self.name}, row {number}: {label!r:.60} in column {self.label_column!r} is not a label."
                    )
                yield number, row[self.image_column], label


class ShardBatch(NamedTuple):
    """Successive rows of one shard."""

    shard: int
    images: list[torch.Tensor | CorruptImageError]
    labels: list[int]


def open_rows(args: ImageArguments, streaming: bool, default_resolution: int) -> StoredRows | StreamedRows:
    """Open the data set that the arguments name.

    Args:
        args: The arguments, which stay as they are; those of the rows returned are complete.
        streaming: Read the files in order, without copying them first.
        default_resolution: Side of the images in pixels if the arguments do not set it.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If nothing can be read there, or the columns or classes cannot be determined.
    """
    rows: StoredRows | StreamedRows
    if streaming:
        args = args.resolved(default_resolution)
        dataset = read_dataset(args, streaming=True)
        rows = StreamedRows(dataset, find_image_column(dataset, args), find_label_column(dataset, args), args)
    else:
        rows = StoredRows(load_images(args, default_resolution))
    check_class_folders(local_path(args.dataset), rows.stored_class_names or ())
    return rows


def shard_batches(
    rows: StoredRows | StreamedRows,
    decode: ImageDecoder,
    shard_size: int,
    batch_size: int,
    wanted: Callable[[int], bool],
    num_threads: int,
) -> Iterator[ShardBatch]:
    """Iterate over the images of some shards, in order, decoded ahead by threads.

    A shard is `shard_size` successive rows, and its batches are `batch_size` of them, so that a batch holds the same
    images whichever shards are wanted.

    Args:
        rows: The data set.
        decode: The decoder.
        shard_size: Rows of a shard.
        batch_size: Rows of a batch.
        wanted: Returns whether to read a shard, given its number.
        num_threads: Threads that decode; Pillow releases Python's global lock meanwhile.
    """
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size), ("num_threads", num_threads)):
        check_value(name, value, (int,), Range(1, 1e9))
    with ThreadPoolExecutor(num_threads) as pool:
        ahead = deque()
        try:
            for shard, batch in _grouped(rows.read(lambda row: wanted(row // shard_size)), shard_size, batch_size):
                labels = [label for _, _, label in batch]
                ahead.append((shard, pool.map(lambda row: _decoded(decode, row, rows.name), batch), labels))
                if len(ahead) > BATCHES_AHEAD:
                    yield _finished(*ahead.popleft())
            while ahead:
                yield _finished(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _numbers_in(class_names):
    """Return the numbers 0, 1, ... that a file of class names has names for; `None` without a file."""
    if class_names is None:
        return None
    names = read_class_names(local_path(class_names))
    numbers = list(itertools.takewhile(names.__contains__, map(str, itertools.count())))
    if not numbers:
        raise ValueError(f"class_names: {class_names} names no numbers, which are the labels of the data set.")
    return numbers


def _grouped(rows, shard_size, batch_size) -> Iterator[tuple[int, list[Any]]]:
    def key(row):
        shard, place = divmod(row[0], shard_size)
        return shard, place // batch_size

    for (shard, _), batch in itertools.groupby(rows, key):
        yield shard, list(batch)


def _decoded(decode, row, name):
    number, image, _ = row
    try:
        return decode(image, number, name)
    except CorruptImageError as error:
        return error


def _finished(shard, images, labels):
    return ShardBatch(shard, list(images), labels)
