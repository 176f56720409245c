"""Compute the accuracy and the confusion of a classifier, for training and for eval/accuracy.py."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data import CorruptImageError
from ..utils.ranges import LARGEST, Range, check_number
from .extraction import ignore_ctrl_c
from .extractors.transformers_models import prepare_picture

#: Number of highest logits among which a label counts for `top5`.
TOP_K = 5
#: Number -> its name in the log of a training run, where `loss` is that of training.
LOG_NAMES = {"top1": "test_accuracy", "top5": "test_accuracy_top5", "loss": "test_loss", "count": "test_images"}


@dataclass(frozen=True)
class Confusion:
    """Predictions of a classifier, counted by class.

    Args:
        labels: The model's label for each class of the data set.
        counts: Images of each class of the data set (rows) by the label predicted (columns), int64.
        found: Images of each class whose label is among the five highest logits; `None` for models of five labels or
            fewer, where that is meaningless.
        loss: Mean cross entropy.
    """

    labels: np.ndarray
    counts: np.ndarray
    found: np.ndarray | None
    loss: float

    @property
    def num_images(self) -> np.ndarray:
        """Images of each class."""
        return self.counts.sum(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Correctly classified images of each class."""
        return self.counts[np.arange(len(self.labels)), self.labels]

    @property
    def top1(self) -> float:
        """Fraction of images whose label has the highest logit."""
        return float(self.correct.sum() / self.num_images.sum())

    @property
    def top1_standard_error(self) -> float:
        """Standard error of `top1` given the number of images, sqrt(p (1 - p) / n)."""
        return float(np.sqrt(self.top1 * (1 - self.top1) / self.num_images.sum()))

    @property
    def top5(self) -> float | None:
        """Fraction of images whose label is among the five highest logits, or `None`."""
        return None if self.found is None else float(self.found.sum() / self.num_images.sum())

    @property
    def class_mean(self) -> float:
        """Mean of the top-1 accuracies of the classes that have images."""
        present = self.num_images > 0
        return float((self.correct[present] / self.num_images[present]).mean())

    def numbers(self) -> dict[str, float | int | None]:
        """Return the numbers of the whole data set, as results files hold them: top1, top5, loss and count."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss, "count": int(self.num_images.sum())}

    def within_data_set(self) -> np.ndarray:
        """Return the counts with a column for each class of the data set, in order, and a last for other labels."""
        own = self.counts[:, self.labels]
        return np.concatenate([own, (self.num_images - own.sum(axis=1))[:, None]], axis=1)


def to_log(numbers: Mapping[str, float | int | None]) -> dict[str, float | int]:
    """Rename the numbers of a test for the log of a training run, and leave out those that are `None`."""
    return {LOG_NAMES[key]: value for key, value in numbers.items() if value is not None}


def from_log(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a test from a record of the log; nothing if the record is not of a test."""
    numbers = {key: record.get(name) for key, name in LOG_NAMES.items()}
    return {} if numbers["top1"] is None else numbers


class RunningConfusion:
    """Counts predictions as integers, so that batches and processes do not change the result.

    Args:
        labels: The model's label for each class of the data set.
        num_labels: Labels of the model.
        device: Device of the logits.
    """

    def __init__(self, labels: Sequence[int], num_labels: int, device: torch.device | str = "cpu"):
        self.labels = torch.tensor(labels, device=device)
        self.counts = torch.zeros(len(labels), num_labels, dtype=torch.int64, device=device)
        self.found = torch.zeros(len(labels), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, classes: torch.Tensor) -> None:
        """Add a batch.

        Args:
            logits: Shape (batch, num_labels).
            classes: Class of the data set of each image, shape (batch,).
        """
        best = logits.topk(min(TOP_K, logits.shape[1])).indices  # (batch, k), the highest first
        labels = self.labels[classes]  # (batch,)
        ones = torch.ones_like(classes)
        self.counts.view(-1).index_add_(0, classes * self.counts.shape[1] + best[:, 0], ones)
        found = (best == labels[:, None]).any(dim=1)
        self.found.index_add_(0, classes, found.long())
        self.loss += F.cross_entropy(logits.float(), labels, reduction="sum")

    def result(self) -> Confusion:
        """Return the counts of all processes together; called by all."""
        tensors = (self.counts, self.found, self.loss)
        counts, found, loss = (gather(tensor[None].contiguous()).sum(dim=0).cpu().numpy() for tensor in tensors)
        has_top5 = counts.shape[1] > TOP_K
        labels = self.labels.cpu().numpy()
        return Confusion(labels, counts, found if has_top5 else None, float(loss / counts.sum()))


class PreparedImages(Dataset):
    """Images as the model's own image processor makes them, with their classes.

    Errors are returned as items, because a data loader's worker would wrap them in its own traceback.

    Args:
        images: Pictures and their classes, as `load_images(..., as_pictures=True)` opens them, or a part of them.
        processor: The image processor that is saved with the model.
        num_channels: Channels of the model's images.
    """

    def __init__(self, images: Any, processor: Any, num_channels: int):
        self.images, self.processor, self.num_channels = images, processor, num_channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int] | CorruptImageError]:
        try:
            pictures = self.images.__getitems__(indices)
        except CorruptImageError as error:
            return [error]
        return [self._prepare(picture, label, row) for row, (picture, label) in zip(indices, pictures, strict=True)]

    def _prepare(self, picture: Any, label: int, row: int) -> tuple[torch.Tensor, int] | CorruptImageError:
        try:
            return prepare_picture(picture, self.processor, self.num_channels), label
        except ValueError as error:
            return CorruptImageError(f"Cannot use row {row} of {self.images.name}: {error}")

    def first(self) -> torch.Tensor:
        """Return the first image, whose shape all have; errors are those of `prepare_picture` and of the data set."""
        (item,) = self.__getitems__([0])
        if isinstance(item, CorruptImageError):
            raise item
        return item[0]


@torch.no_grad()
def classify(
    model: nn.Module,
    images: PreparedImages,
    labels: Sequence[int],
    batch_size: int,
    num_workers: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    require_finite: bool = True,
) -> tuple[Confusion, list[float]]:
    """Classify all images, on all processes, in memory that does not grow with their number.

    Args:
        model: Gives `logits`; in evaluation mode.
        images: The images.
        labels: The model's label for each class of the data set.
        batch_size: Images at a time.
        num_workers: Processes that read and prepare images.
        autocast: Makes the context of the forward pass, such as `accelerator.autocast`.
        require_finite: Refuse logits that are not finite.

    Returns:
        The confusion, and this process's images per second in the forward pass of each whole batch; the first batch,
        which warms up, counts only where there is no other.

    Raises:
        CorruptImageError: If an image cannot be decoded; the message names it.
        ValueError: If images come in several sizes, or logits are not finite.
    """
    check_number("batch_size", batch_size, Range(1, LARGEST))
    check_number("num_workers", num_workers, Range(0, 1024))
    state = PartialState()
    running = RunningConfusion(labels, model.config.num_labels, state.device)
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    mine = [list(batch) for batch in batches[state.process_index :: state.num_processes]]
    loader = DataLoader(
        images, batch_sampler=mine, num_workers=num_workers, collate_fn=list, worker_init_fn=ignore_ctrl_c
    )
    speeds = []
    bar = tqdm(
        total=sum(map(len, mine)), desc="Images", unit="image", leave=False, delay=5, disable=not state.is_main_process
    )
    with bar:
        for rows, items in zip(mine, loader, strict=True):
            pixel_values, classes = _stack(items, images.images.name)
            pixel_values = pixel_values.to(state.device, model.dtype)
            start = _now(state.device)
            with autocast():
                logits = model(pixel_values).logits
            if len(rows) == len(batches[0]):  # the last one may be smaller, and slower an image
                speeds.append(len(rows) / (_now(state.device) - start))
            if require_finite and not logits.isfinite().all():
                bad = (~logits.isfinite()).any(dim=1).nonzero()
                raise ValueError(f"The logits of {images.images.name}, row {rows[int(bad[0])]}, are not finite.")
            running.update(logits, classes.to(state.device))
            bar.update(len(rows))
    return running.result(), speeds[1:] or speeds


def _stack(
    items: Sequence[tuple[torch.Tensor, int] | CorruptImageError], name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    prepared = []
    for item in items:
        if isinstance(item, CorruptImageError):
            raise item
        prepared.append(item)
    shapes = sorted({tuple(pixels.shape) for pixels, _ in prepared})
    if len(shapes) > 1:
        raise ValueError(
            f"The image processor makes tensors of several shapes of {name}, {shapes[0]} and {shapes[-1]} among them: "
            "set batch_size to 1, or let it crop."
        )
    pixels, classes = zip(*prepared, strict=True)
    return torch.stack(pixels), torch.tensor(classes)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
