import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from sdt_diffusion.metrics.comparison import frechet_distance, kernel_distance, manifold_coverage
from sdt_diffusion.metrics.features import FeatureFile, GaussianStatistics, RunningGaussian


def gaussian(mean, covariance, count=None):
    return GaussianStatistics(np.asarray(mean, dtype=float), np.asarray(covariance, dtype=float), count)


def features(n, dim, seed, scale=1.0):
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(features, batch=64):
    running = RunningGaussian()
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


def test_small_eigenvalues_lose_no_digits():
    """Over 40 orders of magnitude, against the singular values of the features themselves."""
    scales = torch.exp(-48 * torch.arange(64) / 64)
    first, second = (features(500, 64, seed) * scales + 0.001 * seed for seed in (0, 1))
    centered = [(f - f.mean(0)) / np.sqrt(499) for f in (first, second)]
    roots = [torch.linalg.qr(c).R.T for c in centered]
    overlap = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    traces = sum(c.square().sum() for c in centered)
    expected = (first.mean(0) - second.mean(0)).square().sum() + traces - 2 * overlap
    assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(expected.item(), rel=1e-9)


def test_few_real_images_lose_no_digits_unlike_in_other_libraries():
    """Against the singular values of the pixels themselves, of fewer images than dimensions."""
    from sklearn.datasets import load_digits
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    pixels = torch.from_numpy(load_digits().data / 16)
    first, second = pixels[:40], pixels[40:80]
    centered = [(f - f.mean(0)) / np.sqrt(39) for f in (first, second)]
    traces = sum(c.square().sum() for c in centered)
    exact = (first.mean(0) - second.mean(0)).square().sum() + traces
    exact = (exact - 2 * torch.linalg.svdvals(centered[0] @ centered[1].T).sum()).item()
    assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(exact, rel=1e-12)
    of_peer = [fid_features_to_statistics(f) for f in (first, second)]
    peer = fid_statistics_to_metric(*of_peer, verbose=False)["frechet_inception_distance"]
    assert 1e-9 < abs(peer / exact - 1) < 1e-4


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


def images(n, seed=0, dim=16):
    """Features of single precision, as networks give them."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


class TestKernelDistance:
    def test_torch_fidelitys_numbers(self):
        first, second = images(300), 1.1 * images(250, 1)
        peer = kid_features_to_metric(
            first.double(), second.double(), kid_subsets=10, kid_subset_size=100, verbose=False
        )
        expected = (peer["kernel_inception_distance_mean"], peer["kernel_inception_distance_std"])
        assert kernel_distance(first, second, 10, 100) == pytest.approx(expected, rel=1e-11)

    def test_the_definition(self):
        """By loops over all pairs, of different images within a set."""
        x, y = images(5, dim=2).double().numpy(), images(5, 1, dim=2).double().numpy()

        def kernel(a, b):
            return (a @ b / 2 + 1) ** 3

        within = [np.mean([kernel(s[i], s[j]) for i in range(5) for j in range(5) if i != j]) for s in (x, y)]
        between = np.mean([kernel(a, b) for a in x for b in y])
        assert kernel_distance(x, y, subsets=1, subset_size=5)[0] == pytest.approx(
            sum(within) - 2 * between, rel=1e-12
        )

    def test_two_sets_of_one_distribution_have_none(self):
        """It is unbiased: smaller than its own spread, and of either sign."""
        distances = [kernel_distance(images(400, s), images(400, s + 1), 1, 400)[0] for s in range(0, 40, 2)]
        assert abs(np.mean(distances)) < 2 * np.std(distances) / np.sqrt(len(distances))
        assert min(distances) < 0 < max(distances)

    def test_bad_features_are_refused(self):
        with pytest.raises(ValueError, match="20 images are too few for KID's subsets of 1000"):
            kernel_distance(images(2000), images(20))
        with pytest.raises(ValueError, match="NaN or infinite"):
            kernel_distance(images(10), images(10) * torch.nan, subset_size=10)


def precision_recall(samples, real, **how):
    return manifold_coverage(samples, real, **how), manifold_coverage(real, samples, **how)


class TestPrecisionAndRecall:
    def test_of_identical_sets_all_is_covered(self):
        assert precision_recall(images(50), images(50)) == (1, 1)

    def test_of_identical_copies_all_is_covered(self):
        """Balls of radius zero around each of 40 points: only distances of exactly zero reach into them."""
        points = images(40, dim=2048) * 100
        assert precision_recall(points, points.repeat(5, 1))[0] == 1

    def test_of_disjoint_sets_nothing_is_covered(self):
        assert precision_recall(images(50), images(50) + 1000) == (0, 0)

    def test_samples_of_which_half_are_real(self):
        """Half of the samples are the real images, the rest far away: precision 1/2, and every real image is found."""
        real = images(50)
        assert precision_recall(torch.cat([real, images(50, 1) + 1000]), real) == (0.5, 1)

    def test_samples_of_one_of_two_modes(self):
        """All samples lie in one of two equal modes: precision 1, recall 1/2."""
        mode = images(50)
        assert precision_recall(mode, torch.cat([mode, mode + 1000])) == (1, 0.5)

    def test_torch_fidelitys_numbers(self):
        samples, real = images(300), 1.1 * images(250, 1) + 0.1
        peer = prc_features_to_metric(samples, real, verbose=False)
        found = precision_recall(samples, real)
        assert found == pytest.approx((peer["precision"], peer["recall"]), rel=1e-6)
        assert 0.1 < min(found) < max(found) < 0.9

    def test_blocks_and_features_on_disk_change_nothing(self, tmp_path):
        samples, real = images(101), images(77, 1)
        expected = precision_recall(samples, real)
        assert precision_recall(samples, real, block=10) == expected
        on_disk = FeatureFile(tmp_path, 77, 16)
        on_disk.append(real.numpy())
        assert precision_recall(samples.numpy(), on_disk, block=10) == expected
        assert list(tmp_path.iterdir()) == []

    def test_bad_features_are_refused(self):
        with pytest.raises(ValueError, match="3 images are too few for 3 nearest neighbors"):
            precision_recall(images(10), images(3))
        with pytest.raises(ValueError, match="NaN or infinite"):
            precision_recall(images(10), np.full((10, 16), np.inf))
