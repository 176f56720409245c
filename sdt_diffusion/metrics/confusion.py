"""Accuracy and confusion of a classifier, added up batch by batch."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather

#: A true label among so many of the highest logits counts as found, besides the one that is the highest.
TOP_K = 5


@dataclass(frozen=True)
class Confusion:
    """What a classifier took images for.

    Args:
        labels: The model's label for each class of the data set.
        counts: Images of each class of the data set (rows) by the label predicted (columns), int64.
        found: Images of each class whose label is among the five highest logits; `None` for models of five labels or
            fewer, where that says nothing.
    """

    labels: np.ndarray
    counts: np.ndarray
    found: np.ndarray | None

    @property
    def num_images(self) -> np.ndarray:
        """Images of each class."""
        return self.counts.sum(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Images of each class that were taken for it."""
        return self.counts[np.arange(len(self.labels)), self.labels]

    @property
    def top1(self) -> float:
        """Fraction of images whose label has the highest logit."""
        return float(self.correct.sum() / self.num_images.sum())

    @property
    def top1_standard_error(self) -> float:
        """Standard error of `top1` for a sample of so many images, sqrt(p (1 - p) / n)."""
        return float(np.sqrt(self.top1 * (1 - self.top1) / self.num_images.sum()))

    @property
    def top5(self) -> float | None:
        """Fraction of images whose label is among the five highest logits, or `None`."""
        return None if self.found is None else float(self.found.sum() / self.num_images.sum())

    @property
    def class_mean(self) -> float:
        """Mean over the classes that have images of each class's top-1 accuracy."""
        present = self.num_images > 0
        return float((self.correct[present] / self.num_images[present]).mean())

    def within_data_set(self) -> np.ndarray:
        """The counts with one column for each class of the data set, in its order, and a last for other labels."""
        own = self.counts[:, self.labels]
        return np.concatenate([own, (self.num_images - own.sum(axis=1))[:, None]], axis=1)


class RunningConfusion:
    """Counts predictions; whole numbers, so that neither batches nor processes nor their order change a digit.

    Args:
        labels: The model's label for each class of the data set.
        num_labels: Labels of the model.
        device: Where the logits come.
    """

    def __init__(self, labels: list[int], num_labels: int, device: torch.device | str = "cpu"):
        self.labels = torch.tensor(labels, device=device)
        self.counts = torch.zeros(len(labels), num_labels, dtype=torch.int64, device=device)
        self.found = torch.zeros(len(labels), dtype=torch.int64, device=device)

    def update(self, logits: torch.Tensor, classes: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            logits: Shape (batch, num_labels).
            classes: Class of the data set of each image, shape (batch,).
        """
        best = logits.topk(min(TOP_K, logits.shape[1])).indices  # (batch, k), the highest first
        ones = torch.ones_like(classes)
        self.counts.view(-1).index_add_(0, classes * self.counts.shape[1] + best[:, 0], ones)
        found = (best == self.labels[classes, None]).any(dim=1)
        self.found.index_add_(0, classes, found.long())

    def result(self) -> Confusion:
        """The counts of all processes together; called by all."""
        counts, found = (gather(x[None].contiguous()).sum(dim=0).cpu().numpy() for x in (self.counts, self.found))
        says_something = counts.shape[1] > TOP_K
        return Confusion(self.labels.cpu().numpy(), counts, found if says_something else None)
