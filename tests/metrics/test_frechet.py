import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from sdt_diffusion.metrics.frechet import GaussianStatistics, RunningStatistics, frechet_distance


def gaussian(mean, covariance, count=None):
    return GaussianStatistics(np.asarray(mean, dtype=float), np.asarray(covariance, dtype=float), count)


def features(n, dim, seed, scale=1.0):
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(features, batch=64):
    running = RunningStatistics()
    for part in torch.as_tensor(features).split(batch):
        running.update(part)
    return running.result()


class TestKnownDistances:
    def test_of_commuting_covariances(self):
        """|m1 - m2|^2 + sum (s1 - s2)^2 for diagonal matrices of s^2."""
        first, second = gaussian([0, 0, 0], np.diag([1.0, 4, 9])), gaussian([1, 2, 0], np.diag([4.0, 4, 0]))
        assert frechet_distance(first, second) == pytest.approx(5 + 1 + 0 + 9, rel=1e-14)

    def test_of_two_by_two_matrices(self):
        """Tr (AB)^1/2 = sqrt(Tr AB + 2 sqrt(det AB))."""
        a, b = np.array([[2.0, 1], [1, 3]]), np.array([[1.0, -0.5], [-0.5, 2]])
        overlap = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
        expected = np.trace(a) + np.trace(b) - 2 * overlap
        assert frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(expected, rel=1e-13)

    def test_of_points(self):
        assert frechet_distance(gaussian([0, 3], np.zeros((2, 2))), gaussian([4, 0], np.zeros((2, 2)))) == 25

    @given(st.integers(0, 1000), st.integers(2, 60))
    def test_of_itself_rotated_and_swapped(self, seed, count):
        """Zero, the same, and the same, whatever the rank: 20 dimensions, 2 to 60 samples."""
        first, second = statistics(features(count, 20, seed)), statistics(features(50, 20, seed + 1, 1.5))
        distance = frechet_distance(first, second)
        rotation = linalg.qr(features(20, 20, seed + 2).numpy())[0]
        rotated = [gaussian(rotation @ g.mean, rotation @ g.covariance @ rotation.T, g.count) for g in (first, second)]
        assert frechet_distance(first, first) == 0
        assert frechet_distance(second, first) == pytest.approx(distance, rel=1e-12)
        assert frechet_distance(*rotated) == pytest.approx(distance, rel=1e-10)
        assert distance > 0


def test_small_eigenvalues_cost_no_digits():
    """Over 40 orders of magnitude, against the singular values of the features themselves."""
    scales = torch.exp(-48 * torch.arange(64) / 64)
    first, second = (features(500, 64, seed) * scales + 0.001 * seed for seed in (0, 1))
    centered = [(f - f.mean(0)) / np.sqrt(499) for f in (first, second)]
    roots = [torch.linalg.qr(c).R.T for c in centered]
    overlap = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    traces = sum(c.square().sum() for c in centered)
    expected = (first.mean(0) - second.mean(0)).square().sum() + traces - 2 * overlap
    assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(expected.item(), rel=1e-9)


class TestAgainstPeers:
    """The same features give the peers' numbers: to 1e-9 at full rank, to 1e-6 below it, where theirs are rounded."""

    @pytest.mark.parametrize(("count", "tolerance"), [(400, 1e-9), (40, 1e-6)], ids=["full rank", "rank-deficient"])
    def test_torch_fidelity(self, count, tolerance):
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        first, second = features(count, 64, 0), features(300, 64, 1, 1.2) + 0.1
        peer = fid_statistics_to_metric(
            fid_features_to_statistics(first), fid_features_to_statistics(second), verbose=False
        )["frechet_inception_distance"]
        assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(peer, rel=tolerance)

    @pytest.mark.parametrize(("count", "tolerance"), [(400, 1e-9), (40, 1e-6)], ids=["full rank", "rank-deficient"])
    def test_clean_fid(self, count, tolerance, monkeypatch):
        from cleanfid import fid

        sqrtm = linalg.sqrtm  # clean-fid passes `disp`, which SciPy 1.18 no longer takes
        monkeypatch.setattr(fid.linalg, "sqrtm", lambda matrix, disp=True: (sqrtm(matrix), 0) if not disp else 0)
        first, second = features(count, 64, 0), features(300, 64, 1, 1.2) + 0.1
        moments = [(f.numpy().mean(0), np.cov(f.numpy(), rowvar=False)) for f in (first, second)]
        peer = fid.frechet_distance(*moments[0], *moments[1])
        assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(peer, rel=tolerance)


def test_running_statistics_are_those_of_the_whole_array_even_far_from_zero():
    far = features(500, 8, 0) + 1e6
    for batch in (1, 7, 500):
        found = statistics(far, batch)
        np.testing.assert_allclose(found.mean, far.numpy().mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.covariance, np.cov(far.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)
        assert found.count == 500


def test_too_few_samples_for_the_rank_are_noticed():
    assert statistics(features(20, 20, 0)).rank == 19
    assert statistics(features(21, 20, 0)).rank == 20
    assert statistics(features(10, 20, 0).repeat(30, 1)).rank == 9  # many images, but the same ones
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        statistics(features(1, 20, 0))


def test_statistics_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="of 2 and 3 dimensions"):
        frechet_distance(gaussian([0, 0], np.eye(2)), gaussian([0, 0, 0], np.eye(3)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(gaussian([0, np.nan], np.eye(2)), gaussian([0, 0], np.eye(2)))
    with pytest.raises(ValueError, match="a negative eigenvalue, -1"):
        frechet_distance(gaussian([0, 0], np.diag([1.0, -1])), gaussian([0, 0], np.eye(2)))
