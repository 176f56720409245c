import os
import pickle
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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
        ({"sigma": np.eye(3) + np.triu(np.ones((3, 3)))}, "mu and sigma: The covariance is not symmetric: .* by 1"),
        ({"sigma": np.eye(3) + 1j}, "sigma is of type complex128"),
        ({"sigma": np.eye(3, dtype=object)}, "sigma is of type object"),
        ({"mu": np.zeros(3, dtype=np.int8)}, "mu is of type int8"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu \(0,\) and sigma \(0, 0\) do not fit"),
        ({"features": np.full((5, 3), np.nan, np.float32)}, "its features hold values that are NaN or infinite"),
        ({"features": np.array([[object()] * 3], dtype=object)}, "features is of type object"),
        ({"features": np.zeros((0, 3))}, r"features of shape \(0, 3\) do not fit"),
        ({"provenance": np.array("[1]")}, "provenance is not what"),
        ({"provenance": np.array(7)}, "provenance is not what"),
        ({"provenance": np.array('{"shape": 8}')}, "provenance is not what"),
        ({"provenance": np.array('{"format": ["PNG"]}')}, "provenance is not what"),
        ({"provenance": np.array('{"count": -3}')}, "provenance is not what"),
        ({"provenance": np.array("[" * 100_000)}, "cannot be read"),
        ({"provenance": np.array('{"count": "many"}')}, "provenance is not what"),
        ({"provenance": np.array("{")}, "cannot be read"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(tmp_path, change, message):
    np.savez(tmp_path / "bad.npz", **{"mu": np.zeros(3), "sigma": np.eye(3), **change})
    with pytest.raises(ValueError, match=f"bad.npz.*{message}"):
        load_summary(tmp_path / "bad.npz")


def npz_that_claims(path, key, shape):
    """Write an `.npz` whose array has a header of that shape, and no values."""
    header = {"descr": "<f8", "fortran_order": False}
    with zipfile.ZipFile(path, "w") as archive:
        for name, claimed in {"mu": (3,), "sigma": (3, 3), key: shape}.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(member, {**header, "shape": claimed})


@pytest.mark.parametrize(
    ("key", "shape"), [("mu", (10**12,)), ("sigma", (3, 10**9)), ("features", (10**10, 3)), ("sigma", (1,) * 30)]
)
def test_sizes_are_bounded_before_memory_is_asked_for(tmp_path, key, shape):
    npz_that_claims(tmp_path / "huge.npz", key, shape)
    with pytest.raises(ValueError, match=rf"huge\.npz: {key} of shape .* is too large"):
        load_summary(tmp_path / "huge.npz")


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
@pytest.mark.parametrize("content", [b"", bytes(500), b"\xff" * 500, b"PK\x05\x06" + bytes(18)])
def test_other_content_is_one_line(tmp_path, ending, content):
    path = tmp_path / f"damaged.{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"damaged\.{ending}") as error:
        load_summary(path)
    assert "\n" not in str(error.value)


def test_a_folder_a_pipe_and_nothing_are_no_references(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("folder.npz", "pipe.safetensors", "nothing.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"There is no file .*{name}"):
            load_summary(tmp_path / name)


def test_safetensors_of_other_types_are_refused_or_read(tmp_path):
    tensors = {"mu": torch.zeros(3), "sigma": torch.eye(3)}
    save_file({**tensors, "mu": torch.zeros(3, dtype=torch.int64)}, tmp_path / "int.safetensors")
    with pytest.raises(ValueError, match=r"int\.safetensors: mu is of type I64"):
        load_summary(tmp_path / "int.safetensors")
    save_file({**tensors, "mu": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "half.safetensors")
    assert load_summary(tmp_path / "half.safetensors").statistics["pool"].mean.tolist() == [1, 1, 1]


def test_references_do_not_tell_where_they_were_made(summary, tmp_path):
    summary.provenance["images"] = str(tmp_path / "private" / "cats")
    save_summary(tmp_path / "reference.npz", summary)
    assert load_summary(tmp_path / "reference.npz").provenance["images"] == ".../cats"


def test_a_full_disk_is_noticed_before_features_and_named(tmp_path):
    with pytest.raises(OSError, match=r"The features of the images will take about .* GB"):
        FeatureFile(tmp_path, 10**12, 2048)
    file = FeatureFile(tmp_path, 10, 3)
    file._file = mock.Mock(write=mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=f"Features cannot be kept there: No space left on device: '{tmp_path}'"):
        file.append(np.zeros((10, 3)))


def test_features_beyond_what_one_read_returns_are_read_whole(tmp_path, monkeypatch):
    array = np.random.default_rng(0).random((10, 3), dtype=np.float32)
    file = FeatureFile(tmp_path, 10, 3)
    file.append(array)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 50), offset))
    assert np.array_equal(file[:], array)


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
