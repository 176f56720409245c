"""Frechet distance between Gaussians fitted to features: FID, sFID, and the same on any other features."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg


@dataclass
class GaussianStatistics:
    """Mean and covariance of features.

    Args:
        mean: Shape (dim,), float64.
        covariance: Shape (dim, dim), float64, with n - 1 in the denominator as `numpy.cov` has it.
        count: Number of samples; `None` where the source does not say.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few samples for a covariance of full rank."""
        return self.count is not None and self.count <= len(self.mean)


class RunningStatistics:
    """Accumulates mean and covariance in float64, a batch at a time, in memory that does not grow.

    Sums are taken around the first batch's mean: without that, features far from zero would lose the digits that their
    covariance is made of.
    """

    def __init__(self):
        self.count = 0

    def update(self, features: torch.Tensor) -> None:
        """Adds features of shape (n, dim)."""
        features = features.double()
        if self.count == 0:
            self.origin = features.mean(0)
            self.sum = torch.zeros_like(self.origin)
            self.outer = torch.zeros(len(self.origin), len(self.origin), dtype=torch.float64, device=features.device)
        centred = features - self.origin
        self.sum += centred.sum(0)
        self.outer.addmm_(centred.T, centred)
        self.count += len(features)

    def result(self) -> GaussianStatistics:
        """The statistics of all features so far.

        Raises:
            ValueError: If there are fewer than two.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, not {self.count}.")
        mean = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return GaussianStatistics((self.origin + mean).cpu().numpy(), covariance.cpu().numpy(), self.count)


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^1/2), by symmetric eigendecompositions in float64.

    With any R for which R R^T = S1, Tr (S1 S2)^1/2 is the sum of the square roots of the eigenvalues of R^T S2 R: a
    symmetric matrix, so no complex numbers and no failure on singular covariances. R leaves out the null space of S1,
    whose eigenvalues are rounding errors that the square root would make large; S1 is the one of fewer samples.

    Raises:
        ValueError: If the dimensions differ or a value is not finite.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"Statistics of {len(first.mean)} and {len(second.mean)} dimensions cannot be compared.")
    for array in (first.mean, first.covariance, second.mean, second.covariance):
        if not np.isfinite(array).all():
            raise ValueError("The statistics hold values that are NaN or infinite.")
    if (second.count or np.inf) < (first.count or np.inf):
        first, second = second, first
    eigenvalues, eigenvectors = linalg.eigh(first.covariance)
    kept = eigenvalues > len(eigenvalues) * np.finfo(np.float64).eps * abs(eigenvalues).max()
    root = eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])
    overlap = np.sqrt(linalg.eigvalsh(root.T @ second.covariance @ root).clip(min=0)).sum() if kept.any() else 0.0
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap)
