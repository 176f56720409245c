import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from sdt_diffusion.metrics.inception_score import RunningInceptionScore


def inception_score(logits, splits=10):
    """Of logits in one array."""
    score = RunningInceptionScore(len(logits), splits)
    score.update(logits)
    return score.result()


def test_a_perfect_classifier_scores_the_number_of_classes():
    logits = 1e3 * torch.eye(10).repeat(500, 1)
    assert inception_score(logits, splits=1) == pytest.approx((10, 0), rel=1e-12)


def test_a_classifier_that_knows_nothing_scores_one():
    assert inception_score(torch.full((100, 7), 0.3)) == pytest.approx((1, 0), abs=1e-12)


def test_images_in_class_order_are_shuffled():
    """In order, each of 10 splits would hold one class, and score 1."""
    logits = 1e3 * torch.eye(10).repeat_interleave(500, dim=0)
    assert inception_score(logits)[0] == pytest.approx(10, rel=0.01)


def test_torch_fidelitys_score():
    logits = 3 * torch.randn(1003, 20, generator=torch.Generator().manual_seed(0))
    peer = isc_features_to_metric(logits, splits=10)
    expected = (peer["inception_score_mean"], peer["inception_score_std"])
    assert inception_score(logits) == pytest.approx(expected, rel=1e-12)


def test_batches_change_nothing():
    logits = 3 * torch.randn(103, 20, generator=torch.Generator().manual_seed(0))
    running = RunningInceptionScore(103)
    for part in logits.split(9):
        running.update(part)
    assert running.result() == pytest.approx(inception_score(logits), rel=1e-13)


def test_fewer_images_than_splits_are_refused():
    with pytest.raises(ValueError, match="9 images cannot be divided into 10 splits"):
        inception_score(torch.zeros(9, 5))
