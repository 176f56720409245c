"""Compare two sets of features: Frechet distance (FID, sFID), kernel distance (KID), precision and recall."""

from collections.abc import Iterator

import numpy as np
import torch

from ..utils.ranges import LARGEST, Range, check_number
from .features import Features, GaussianStatistics, rows_of

#: Neighbors that decide the radius of a ball, by convention.
NEIGHBORHOOD = 3


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """Return the Frechet distance |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^1/2), in float64.

    With R1 R1^T = S1 and R2 R2^T = S2, the eigenvalues of S1 S2 are the squared singular values of R1^T R2. So the
    trace of (S1 S2)^1/2 is the sum of the singular values, and no square root of a rounding error is taken, which is
    why this is not torch-fidelity's or clean-fid's function (see docs/evaluation.md).

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


def kernel_distance(
    first: Features, second: Features, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Return the Kernel Inception Distance (Binkowski et al. 2018), on the CPU in float64.

    It is the unbiased squared maximum mean discrepancy under the kernel (x.y / dim + 1)^3, averaged over random
    subsets. torch-fidelity computes it for each subset; the subsets are drawn here, as it draws them, because it would
    need all features in memory.

    Args:
        first: Features, shape (n, dim).
        second: Features, shape (m, dim).
        subsets: Number of subsets.
        subset_size: Features of each set in a subset.
        seed: Seed of the subsets, torch-fidelity's by default.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: If there are fewer features than a subset needs, or one is not finite.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    check_number("subsets", subsets, Range(1, LARGEST))
    check_number("subset_size", subset_size, Range(2, LARGEST))
    for features in (first, second):
        if len(features) < subset_size:
            raise ValueError(f"{len(features)} images are too few for KID's subsets of {subset_size}.")
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        subset = [
            rows_of(features, random.choice(len(features), subset_size, replace=False), "cpu")
            for features in (first, second)
        ]
        found = kid_features_to_metric(*subset, kid_subsets=1, kid_subset_size=subset_size, verbose=False)
        distances.append(found[KEY_METRIC_KID_MEAN])
    return float(np.mean(distances)), float(np.std(distances))


def manifold_coverage(
    points: Features,
    centers: Features,
    neighborhood: int = NEIGHBORHOOD,
    block: int = 1024,
    device: torch.device | str = "cpu",
) -> float:
    """Return the fraction of points in the manifold of the centers (Kynkaanniemi et al. 2019).

    Precision is that of samples in the manifold of real images, recall that of real images in the manifold of samples.
    The manifold is the union of balls around the centers, each reaching to the k-th nearest other center.

    This is not torch-fidelity's function, which needs all features in memory, and beside them 233 MiB for 10,000 by
    10,000 in blocks of 1024 (this: 73 MiB); the values are equal.

    Args:
        points: Features, shape (n, dim).
        centers: Features, shape (m, dim).
        neighborhood: k.
        block: Rows and columns of the blocks in which distances are computed.
        device: Where to compute, in float64.

    Raises:
        ValueError: If there are not more than k features of either, or one is not finite.
    """
    check_number("neighborhood", neighborhood, Range(1, LARGEST))
    check_number("block", block, Range(1, LARGEST))
    for features in (points, centers):
        if len(features) <= neighborhood:
            raise ValueError(f"{len(features)} images are too few for {neighborhood} nearest neighbors.")
    radii = _squared_radii(centers, neighborhood, block, device)  # (m,)
    covered = 0
    for part in _blocks(points, block, device):
        inside = torch.zeros(len(part), dtype=torch.bool, device=device)
        for some, reach in zip(_blocks(centers, block, device), radii.split(block), strict=True):
            inside |= (_squared_distances(part, some) <= reach).any(dim=1)
        covered += int(inside.sum())
    return covered / len(points)


def _squared_radii(centers, neighborhood, block, device):
    """Return the squared distance of each center to its k-th nearest other one."""
    radii = []
    for part in _blocks(centers, block, device):
        nearest = torch.full((len(part), neighborhood + 1), torch.inf, dtype=torch.float64, device=device)
        for others in _blocks(centers, block, device):
            distances = torch.cat([nearest, _squared_distances(part, others)], dim=1)
            nearest = distances.topk(neighborhood + 1, dim=1, largest=False).values  # includes the center itself
        radii.append(nearest.amax(dim=1))
    return torch.cat(radii)


def _squared_distances(x, y):
    """Return |x|^2 + |y|^2 - 2 x.y, where differences within rounding errors are set to zero."""
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = norms - 2 * x @ y.T
    return distances.masked_fill_(distances < 1e-13 * norms, 0)


def _blocks(features: Features, block: int, device) -> Iterator[torch.Tensor]:
    for start in range(0, len(features), block):
        yield rows_of(features, slice(start, start + block), device)
