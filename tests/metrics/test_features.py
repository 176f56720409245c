import pickle

import numpy as np
import pytest

from sdt_diffusion.metrics.features import (
    FeatureFile,
    FeatureSummary,
    GaussianStatistics,
    has_statistics,
    load_summary,
    save_summary,
)


def test_a_file_of_features_reads_like_the_array_it_stands_for_and_leaves_no_file(tmp_path):
    array = np.random.default_rng(0).random((10, 3), dtype=np.float32)
    file = FeatureFile(tmp_path, 10, 3)
    file.append(array[:4])
    file.append(array[4:])
    assert len(file) == 10
    assert file.shape == (10, 3)
    assert np.array_equal(file[:], array)
    assert np.array_equal(file[2:5], array[2:5])
    assert np.array_equal(file[np.array([9, 0, 3])], array[[9, 0, 3]])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def summary():
    random = np.random.default_rng(0)
    gaussians = {
        kind: GaussianStatistics(random.random(n), np.cov(random.random((n, 9))), 9)
        for kind, n in (("pool", 3), ("spatial", 2))
    }
    provenance = {"extractor": "pixels", "count": 9}
    return FeatureSummary(gaussians, random.random((5, 3), dtype=np.float32), provenance=provenance)


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_a_file_gives_back_what_went_in(summary, tmp_path, ending):
    path = tmp_path / f"reference.{ending}"
    save_summary(path, summary)
    assert has_statistics(path)
    loaded = load_summary(path)
    for kind, gaussian in summary.statistics.items():
        assert np.array_equal(loaded.statistics[kind].mean, gaussian.mean)
        assert np.array_equal(loaded.statistics[kind].covariance, gaussian.covariance)
        assert loaded.statistics[kind].count == 9
    assert np.array_equal(loaded.features, summary.features)
    assert loaded.provenance == summary.provenance
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_adms_files_are_read(tmp_path):
    path = tmp_path / "VIRTUAL.npz"
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2, np.float32), "sigma_s": np.eye(2)}
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3), np.uint8), **arrays)
    loaded = load_summary(path)
    assert {kind: len(gaussian.mean) for kind, gaussian in loaded.statistics.items()} == {"pool": 3, "spatial": 2}
    assert loaded.statistics["spatial"].mean.dtype == np.float64
    assert loaded.features is None
    assert loaded.provenance == {}


def test_an_npz_of_images_is_none_of_statistics(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    assert not has_statistics(tmp_path / "images.npz")


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_a_damaged_file_is_named(summary, tmp_path, ending):
    path = tmp_path / f"cut.{ending}"
    save_summary(path, summary)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"cut.{ending}"):
        load_summary(path)


def test_files_without_statistics_or_with_others_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match=r"a.npz holds no statistics \(mu and sigma\)"):
        load_summary(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"b.npz: mu \(3,\) and sigma \(4, 4\) do not fit"):
        load_summary(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((5, 4))}, r"features of shape \(5, 4\) do not fit"),
        ({"features": np.zeros(5)}, r"features of shape \(5,\) do not fit"),
        ({"mu": np.full(3, np.nan)}, "mu and sigma: The statistics hold values that are NaN"),
        ({"sigma": -np.eye(3)}, "mu and sigma: The covariance has a negative eigenvalue"),
        ({"provenance": np.array("[1]")}, "provenance is not what"),
        ({"provenance": np.array('{"count": "many"}')}, "provenance is not what"),
        ({"provenance": np.array("{")}, "cannot be read"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(tmp_path, change, message):
    np.savez(tmp_path / "bad.npz", **{"mu": np.zeros(3), "sigma": np.eye(3), **change})
    with pytest.raises(ValueError, match=f"bad.npz.*{message}"):
        load_summary(tmp_path / "bad.npz")


def test_an_array_under_the_wrong_ending_is_refused(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros(3))
    (tmp_path / "images.npy").rename(tmp_path / "images.npz")
    with pytest.raises(ValueError, match=r"images.npz is not a complete .npz file"):
        has_statistics(tmp_path / "images.npz")


def test_nothing_is_overwritten_and_nothing_half_written_is_left(summary, tmp_path, monkeypatch):
    path = tmp_path / "reference.npz"
    save_summary(path, summary)
    with pytest.raises(ValueError, match="exists already"):
        save_summary(path, summary)
    with pytest.raises(ValueError, match=r"must end in .safetensors or .npz"):
        save_summary(tmp_path / "reference.pt", summary)

    def full(path, **arrays):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        save_summary(tmp_path / "other.npz", summary)
    assert [file.name for file in tmp_path.iterdir()] == ["reference.npz"]


@pytest.mark.parametrize("read", [has_statistics, load_summary])
def test_a_pickled_reference_is_refused_with_what_to_do_instead(tmp_path, read):
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps({"fid": {"mu": np.zeros(3), "sigma": np.eye(3)}}))
    with pytest.raises(ValueError, match=r"img512\.pkl is a pickle, such as EDM2's .*eval/make_reference\.py"):
        read(path)
