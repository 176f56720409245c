import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from sdt_diffusion.metrics.kid import kernel_distance


def features(n, seed=0, dim=16):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_torch_fidelitys_numbers():
    first, second = features(300), 1.1 * features(250, 1)
    peer = kid_features_to_metric(first.double(), second.double(), kid_subsets=10, kid_subset_size=100, verbose=False)
    expected = (peer["kernel_inception_distance_mean"], peer["kernel_inception_distance_std"])
    assert kernel_distance(first, second, 10, 100) == pytest.approx(expected, rel=1e-11)


def test_the_definition():
    """By loops over all pairs, of different images within a set."""
    x, y = features(5, dim=2).double().numpy(), features(5, 1, dim=2).double().numpy()

    def kernel(a, b):
        return (a @ b / 2 + 1) ** 3

    within = [np.mean([kernel(s[i], s[j]) for i in range(5) for j in range(5) if i != j]) for s in (x, y)]
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y, subsets=1, subset_size=5)[0] == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_two_sets_of_one_distribution_have_none():
    """It is unbiased: smaller than its own spread, and of either sign."""
    distances = [kernel_distance(features(400, s), features(400, s + 1), 1, 400)[0] for s in range(0, 40, 2)]
    assert abs(np.mean(distances)) < 2 * np.std(distances) / np.sqrt(len(distances))
    assert min(distances) < 0 < max(distances)


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="20 images are too few for KID's subsets of 1000"):
        kernel_distance(features(2000), features(20))
    with pytest.raises(ValueError, match="NaN or infinite"):
        kernel_distance(features(10), features(10) * torch.nan, subset_size=10)
