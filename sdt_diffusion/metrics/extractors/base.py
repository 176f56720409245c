"""What an extractor of features is."""

from abc import ABC, abstractmethod

import numpy as np
import torch


class FeatureExtractor(ABC):
    """Turns images into features, in two steps, the first of which may run in the workers of a data loader."""

    #: As it is asked for, and as it stands beside every number.
    name: str
    #: In words, how images come to the network's size.
    resize: str
    #: Names the weights; two extractors of one name and other weights give features that cannot be compared.
    fingerprint: str
    #: Which of "pool" (FID and the like), "spatial" (sFID) and "logits" (Inception Score) it gives.
    provides: frozenset[str]
    #: Dimension of each kind of features, where it does not depend on the images.
    dims: dict[str, int] = {}  # noqa: RUF012  (a constant)
    #: Whether numbers go by their published names: an FID is of Inception's features.
    is_inception: bool = False
    #: Images at a time. Fixed, and the last batch is filled up, so that no choice of the user changes a digit.
    batch_size: int = 64

    @abstractmethod
    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """An image of shape (height, width, 1 or 3), uint8, as the network wants it but for the batch."""

    @abstractmethod
    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Prepared images to features, each of shape (n, dim); on the device the extractor was built for."""

    @property
    def identity(self) -> dict[str, str]:
        """What must be the same for features to be comparable."""
        return {"extractor": self.name, "resize": self.resize, "weights": self.fingerprint}


def as_rgb(image: np.ndarray) -> np.ndarray:
    """An image with three channels; grey is repeated."""
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)
