"""Frechet distance between Gaussians fitted to features: FID, sFID, and the same on any other features."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


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

    @cached_property
    def root(self) -> torch.Tensor:
        """A matrix R of shape (dim, rank) with R R^T the covariance.

        Cholesky's where the rank is full beyond doubt. Elsewhere by eigenvalues, leaving out the null space, whose
        eigenvalues are rounding errors that the root would make large.

        Raises:
            ValueError: If the covariance is not finite, or has negative eigenvalues.
        """
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("The statistics hold values that are NaN or infinite.")
        covariance = torch.from_numpy(self.covariance)
        rounding = len(covariance) * torch.finfo(torch.float64).eps * covariance.diagonal().max()
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not failed and factor.diagonal().min() ** 2 > 1e3 * rounding:
            return factor
        values, vectors = torch.linalg.eigh(covariance)
        rounding = len(values) * torch.finfo(torch.float64).eps * values.abs().max()
        if values[0] < -1e3 * rounding:
            raise ValueError(f"The covariance has a negative eigenvalue, {values[0]:.3g}.")
        return vectors[:, values > rounding] * values[values > rounding].sqrt()

    def check(self) -> None:
        """Refuses what is no Gaussian, with the errors of `root`."""
        _ = self.root

    @property
    def rank(self) -> int:
        """Rank of the covariance, up to rounding."""
        return self.root.shape[1]


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
        centered = features - self.origin
        self.sum += centered.sum(0)
        self.outer.addmm_(centered.T, centered)
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
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^1/2), in float64.

    With R1 R1^T = S1 and R2 R2^T = S2, the eigenvalues of S1 S2 are the squared singular values of R1^T R2. So the
    trace of the root is their sum, and no root of a rounding error is taken.

    Raises:
        ValueError: If the dimensions differ, or one is not the Gaussian of finite features.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"Statistics of {len(first.mean)} and {len(second.mean)} dimensions cannot be compared.")
    overlap = torch.linalg.svdvals(first.root.T @ second.root).sum().item()
    difference = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    distance = float(difference @ difference + traces - 2 * overlap)
    rounding = len(difference) * np.finfo(np.float64).eps * traces
    return distance if distance > rounding else 0.0
