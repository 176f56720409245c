"""Every image of a data set once, in batches of the same images on any number of processes."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..decoding import CorruptImageError, ImageDecoder
from ..images import (
    ImageArguments,
    check_class_folders,
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
    """The rows of a data set that can be read from anywhere; the others cost nothing.

    Args:
        images: The data set.
    """

    def __init__(self, images):
        self.images, self.name, self.class_names = images, images.name, images.class_names
        self.num_rows = len(images)

    def read(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict, int]]:
        """Number, encoded image and label of the rows whose number is wanted, in order."""
        numbers = [number for number in range(len(self.images)) if wanted(number)]
        for start in range(0, len(numbers), ROWS_AT_ONCE):
            chunk = numbers[start : start + ROWS_AT_ONCE]
            encoded = self.images.dataset[chunk][self.images.image_column]
            yield from zip(chunk, encoded, self.images.labels[chunk].tolist(), strict=True)


class StreamedRows:
    """The rows of a data set that comes by, such as a tar file: those that are not wanted are read, but not decoded.

    Args:
        dataset: A `datasets.IterableDataset`.
        image_column: Column of type `datasets.Image`.
        label_column: Column of integers or `datasets.ClassLabel`.
        name: What to call the data set in messages.

    Raises:
        ValueError: If the labels are no numbers.
    """

    num_rows: int | None = None  # nobody knows before the end

    def __init__(self, dataset, image_column: str, label_column: str, name: str):
        from datasets import ClassLabel, Image

        feature = dataset.features[label_column]
        self.class_names = list(feature.names) if isinstance(feature, ClassLabel) else None
        if self.class_names is None and "int" not in str(getattr(feature, "dtype", "")):
            raise ValueError(
                f"{name}: the labels in column {label_column!r} are no integers, and the names of all classes are not "
                "known before a stream ends. Leave out --streaming, or name another --label_column."
            )
        self.dataset = dataset.cast_column(image_column, Image(decode=False))
        self.image_column, self.label_column, self.name = image_column, label_column, name

    def read(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict, int]]:
        """Number, encoded image and label of the rows whose number is wanted, in order; at the end sets `num_rows`.

        Raises:
            ValueError: If a label is none, or the stream breaks off.
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
                if not isinstance(label, int) or not 0 <= label < len(self.class_names or range(label + 1)):
                    raise ValueError(
                        f"{self.name}, row {number}: {label!r} in column {self.label_column!r} is no label."
                    )
                yield number, row[self.image_column], label


class ShardBatch(NamedTuple):
    """Neighbouring rows of one shard."""

    shard: int
    images: list[torch.Tensor | CorruptImageError]
    labels: list[int]


def open_rows(args: ImageArguments, streaming: bool, default_resolution: int) -> StoredRows | StreamedRows:
    """Opens the data set that the arguments name.

    Args:
        args: The arguments, into which the values that they left open are filled.
        streaming: Read it in passing.
        default_resolution: Side of the images in pixels where the arguments leave it open.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If nothing can be read there, or the columns or classes cannot be told.
    """
    if streaming:
        args.fill_in(default_resolution)
        dataset = read_dataset(args, streaming=True)
        rows = StreamedRows(dataset, find_image_column(dataset, args), find_label_column(dataset, args), args.dataset)
    else:
        rows = StoredRows(load_images(args, default_resolution))
    check_class_folders(Path(args.dataset).expanduser(), rows.class_names or ())
    return rows


def shard_batches(
    rows: StoredRows | StreamedRows,
    decode: ImageDecoder,
    shard_size: int,
    batch_size: int,
    wanted: Callable[[int], bool],
    num_threads: int,
) -> Iterator[ShardBatch]:
    """The images of some shards, in order, decoded ahead by threads.

    A shard is `shard_size` neighbouring rows. A batch starts with the shard or `batch_size` rows later, so that it
    holds the same images whichever shards are wanted.

    Args:
        rows: The data set.
        decode: The decoder.
        shard_size: Rows of a shard.
        batch_size: Rows of a batch.
        wanted: Whether a shard, given by its number, is.
        num_threads: Number of threads. Pillow decodes outside of Python's lock.
    """
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


def _grouped(rows, shard_size, batch_size) -> Iterator[tuple[int, list[Any]]]:
    batch, key = [], None
    for row in rows:
        shard, place = divmod(row[0], shard_size)
        if key not in (None, (shard, place // batch_size)):
            yield key[0], batch
            batch = []
        key = (shard, place // batch_size)
        batch.append(row)
    if batch:
        yield key[0], batch


def _decoded(decode, row, name):
    number, image, _ = row
    try:
        return decode(image, number, name)
    except CorruptImageError as error:
        return error


def _finished(shard, images, labels):
    return ShardBatch(shard, list(images), labels)
