"""Improved precision and recall (Kynkaanniemi et al. 2019)."""

from collections.abc import Iterator

import torch

from .features import Features, rows_of

#: Neighbors that make a ball, by convention.
NEIGHBORHOOD = 3


def precision_recall(
    samples: Features,
    real: Features,
    neighborhood: int = NEIGHBORHOOD,
    block: int = 1024,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """How many samples lie in the manifold of the real features, and the other way round.

    A manifold is the union of balls around its features, each reaching to the k-th nearest neighbor. Distances are
    taken in blocks, so that memory does not grow with n^2.

    Args:
        samples: Features of samples, shape (n, dim).
        real: Features of real images, shape (m, dim).
        neighborhood: k.
        block: Rows and columns of a block of distances.
        device: Where to compute, in float64.

    Returns:
        Precision and recall.

    Raises:
        ValueError: If there are not more than k features, or one is not finite.
    """
    for name, features in (("samples", samples), ("real images", real)):
        if len(features) <= neighborhood:
            raise ValueError(f"{len(features)} {name} are too few for {neighborhood} nearest neighbors.")
    sides = ((samples, real), (real, samples))
    return tuple(
        _covered(points, _radii(centers, neighborhood, block, device), centers, block, device)
        for points, centers in sides
    )


def _radii(centers, neighborhood, block, device):
    """Squared distance of each centre to its k-th nearest other one."""
    radii = []
    for part in _blocks(centers, block, device):
        nearest = torch.full((len(part), neighborhood + 1), torch.inf, dtype=torch.float64, device=device)
        for others in _blocks(centers, block, device):
            distances = torch.cat([nearest, _squared_distances(part, others)], dim=1)
            nearest = distances.topk(neighborhood + 1, dim=1, largest=False).values  # itself included
        radii.append(nearest.amax(dim=1))
    return torch.cat(radii)


def _covered(points, radii, centers, block, device):
    """Fraction of points within reach of any centre."""
    covered = 0
    for part in _blocks(points, block, device):
        inside = torch.zeros(len(part), dtype=torch.bool, device=device)
        for some, reach in zip(_blocks(centers, block, device), radii.split(block), strict=True):
            inside |= (_squared_distances(part, some) <= reach).any(dim=1)
        covered += int(inside.sum())
    return covered / len(points)


def _squared_distances(x, y):
    """|x|^2 + |y|^2 - 2 x.y, with the rounding errors of equal features set to the zero that they stand for."""
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = norms - 2 * x @ y.T
    return distances.masked_fill_(distances < 1e-13 * norms, 0)


def _blocks(features: Features, block: int, device) -> Iterator[torch.Tensor]:
    for start in range(0, len(features), block):
        yield rows_of(features, slice(start, start + block), device)
