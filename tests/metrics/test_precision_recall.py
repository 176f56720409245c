from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from sdt_diffusion.metrics.features import FeatureFile
from sdt_diffusion.metrics.precision_recall import precision_recall


def features(n, seed=0, dim=16):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_of_identical_sets_all_is_covered():
    assert precision_recall(features(50), features(50)) == (1, 1)


def test_of_identical_copies_all_is_covered():
    """Balls of radius zero around each of 40 points: only distances of exactly zero reach into them."""
    points = features(40, dim=2048) * 100
    assert precision_recall(points, points.repeat(5, 1))[0] == 1


def test_of_disjoint_sets_nothing_is_covered():
    assert precision_recall(features(50), features(50) + 1000) == (0, 0)


def test_samples_of_which_half_are_real():
    """Half of the samples are the real images, the rest far away: precision 1/2, and every real image is found."""
    real = features(50)
    assert precision_recall(torch.cat([real, features(50, 1) + 1000]), real) == (0.5, 1)


def test_samples_of_one_of_two_modes():
    """All samples lie in one of two equal modes: precision 1, recall 1/2."""
    mode = features(50)
    assert precision_recall(mode, torch.cat([mode, mode + 1000])) == (1, 0.5)


def test_torch_fidelitys_numbers():
    samples, real = features(300), 1.1 * features(250, 1) + 0.1
    peer = prc_features_to_metric(samples, real, verbose=False)
    found = precision_recall(samples, real)
    assert found == pytest.approx((peer["precision"], peer["recall"]), rel=1e-6)
    assert 0.1 < min(found) < max(found) < 0.9


def test_blocks_and_features_on_disk_change_nothing(tmp_path):
    samples, real = features(101), features(77, 1)
    expected = precision_recall(samples, real)
    assert precision_recall(samples, real, block=10) == expected
    on_disk = FeatureFile(tmp_path, 77, 16)
    on_disk.append(real.numpy())
    assert precision_recall(samples.numpy(), on_disk, block=10) == expected
    assert list(Path(tmp_path).iterdir()) == []


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="3 real images are too few for 3 nearest neighbors"):
        precision_recall(features(10), features(3))
    with pytest.raises(ValueError, match="NaN or infinite"):
        precision_recall(features(10), np.full((10, 16), np.inf))
