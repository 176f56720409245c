"""Pixels as features."""

import numpy as np
import torch

from .base import FeatureExtractor, as_rgb

#: Beyond this a covariance takes gigabytes and its eigenvalues an hour.
MAX_VALUES = 4096


class Pixels(FeatureExtractor):
    """The pixels themselves, as RGB, 0 to 1: for small images, where Inception has nothing to say.

    Args:
        device: Where to run.
    """

    name = "pixels"
    resize = "none"
    fingerprint = "none"
    provides = frozenset({"pool"})

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        image = as_rgb(image)
        if image.size > MAX_VALUES:
            raise ValueError(f"its {image.size} values are too many for pixels as features; at most {MAX_VALUES}")
        return torch.from_numpy(image.reshape(-1))

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pool": batch.float() / 255}
