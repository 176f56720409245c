"""Kernel Inception Distance (Binkowski et al. 2018)."""

import numpy as np
import torch

from .features import Features, rows_of


def kernel_distance(
    first: Features,
    second: Features,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy under the kernel (x.y / dim + 1)^3, averaged over random subsets.

    Args:
        first: Features, shape (n, dim).
        second: Features, shape (m, dim).
        subsets: Number of subsets.
        subset_size: Features of each set in a subset.
        seed: Seed of the subsets, torch-fidelity's by default.
        device: Where to compute, in float64.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: If there are fewer features than a subset needs, or one is not finite.
    """
    for features in (first, second):
        if len(features) < subset_size:
            raise ValueError(f"{len(features)} images are too few for KID's subsets of {subset_size}.")
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x, y = (
            rows_of(features, random.choice(len(features), subset_size, replace=False), device)
            for features in (first, second)
        )
        within = _off_diagonal_mean(_kernel(x, x)) + _off_diagonal_mean(_kernel(y, y))
        distances.append((within - 2 * _kernel(x, y).mean()).item())
    return float(np.mean(distances)), float(np.std(distances))


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(kernel):
    n = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))
