"""Summaries of sets of images for metrics: features, their Gaussians, and the record of how they were made."""

import contextlib
import json
import os
import tempfile
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from ..data.raw_images import map_npz_array
from ..utils.files import check_new, require_space, shorten_path, valid_json, write_atomically
from ..utils.reading import MAX_TEXT_BYTES

#: Kind of features -> names of mean and covariance in a file, as in ADM's reference statistics.
STATISTICS_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
FEATURES_KEY = "features"
PROVENANCE_KEY = "provenance"
KNOWN_KEYS = (*(key for pair in STATISTICS_KEYS.values() for key in pair), FEATURES_KEY)
#: Largest dimension of features: a covariance of it takes 2 GiB. Largest number of features that are kept.
MAX_DIM, MAX_FEATURES = 16_384, 1_000_000
#: First number of the version of an array's header -> function that reads it.
_READ_HEADER = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}


class FeatureFile:
    """A float32 array of features in an unnamed temporary file, which the system deletes when the process ends.

    It is read by slices or index arrays, like an array. It is not mapped into memory, because the system would read
    neighboring pages too and count all of them as memory of the process.

    Args:
        folder: Folder on the disk for the file.
        rows: Number of features.
        dim: Their dimension.
    """

    def __init__(self, folder: Path, rows: int, dim: int):
        self.shape, self._folder = (rows, dim), folder
        require_space(folder, 4 * rows * dim, "The features of the images")
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (lives as long as the object)

    def __del__(self):
        if hasattr(self, "_file"):  # not if it could not be made
            with contextlib.suppress(OSError):  # what a full disk has not taken, which `append` has reported
                self._file.close()

    def __len__(self) -> int:
        return self.shape[0]

    def append(self, features: np.ndarray) -> None:
        """Add features of shape (n, dim).

        Raises:
            OSError: If the disk is full; names the folder.
        """
        try:
            self._file.write(np.ascontiguousarray(features, dtype=np.float32).tobytes())
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno, f"Features cannot be kept there: {error.strerror}", str(self._folder)
            ) from error

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            data = self._read(start, stop)
        else:
            data = b"".join(self._read(int(row), int(row) + 1) for row in rows)
        return np.frombuffer(data, dtype=np.float32).reshape(-1, self.shape[1])

    def _read(self, start: int, stop: int) -> bytes:
        size = 4 * self.shape[1]
        parts, offset, end = [], start * size, stop * size
        while offset < end:  # the system reads at most 2 GiB at a time
            parts.append(os.pread(self._file.fileno(), end - offset, offset))
            if not parts[-1]:
                raise OSError(f"The features of {len(self)} images end early, at byte {offset}.")
            offset += len(parts[-1])
        return b"".join(parts)


#: Features of shape (n, dim).
Features = np.ndarray | torch.Tensor | FeatureFile


def rows_of(features: Features, rows: slice | np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Return some of the features as float64.

    Raises:
        ValueError: If one of them is NaN or infinite.
    """
    block = features[rows]
    if isinstance(block, np.ndarray):
        block = torch.from_numpy(np.array(block, dtype=np.float64))  # a copy: torch warns of read-only files
    block = block.to(device, torch.float64)
    if not torch.isfinite(block).all():
        raise ValueError("The features hold values that are NaN or infinite.")
    return block


@dataclass
class GaussianStatistics:
    """Mean and covariance of features.

    Args:
        mean: Shape (dim,), float64.
        covariance: Shape (dim, dim), float64, with n - 1 in the denominator as `numpy.cov` has it.
        count: Number of samples; `None` if the source does not say.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    @cached_property
    def root(self) -> torch.Tensor:
        """Matrix R of shape (dim, rank) with R R^T the covariance.

        It is Cholesky's factor where the covariance has full rank beyond rounding. Otherwise it is made of
        eigenvectors without the null space, whose eigenvalues are rounding errors that a square root would enlarge.

        Raises:
            ValueError: If the covariance is not finite, not symmetric, or has negative eigenvalues.
        """
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("The statistics hold values that are NaN or infinite.")
        asymmetry = np.abs(self.covariance - self.covariance.T).max()
        if asymmetry > 1e-5 * np.abs(self.covariance.diagonal()).max():
            raise ValueError(f"The covariance is not symmetric: entries differ by {asymmetry:.3g}.")
        covariance = torch.from_numpy(self.covariance)
        rounding = len(covariance) * torch.finfo(torch.float64).eps * covariance.diagonal().max()
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not failed and factor.diagonal().min() ** 2 > 1e3 * rounding:
            return factor
        values, vectors = torch.linalg.eigh(covariance)
        rounding = len(values) * torch.finfo(torch.float64).eps * values.abs().max()
        if values[0] < -1e3 * rounding:
            raise ValueError(f"The covariance has a negative eigenvalue, {values[0]:.3g}.")
        return vectors[:, values > rounding] * values[values > rounding].sqrt()

    def check(self) -> None:
        """Refuse what is not a Gaussian, with the errors of `root`."""
        _ = self.root

    @property
    def rank(self) -> int:
        """Rank of the covariance, up to rounding."""
        return self.root.shape[1]


class RunningGaussian:
    """Accumulates mean and covariance of features in float64, batch by batch.

    The mean of the first batch is subtracted first: otherwise features far from zero would lose the digits of their
    covariance.
    """

    def __init__(self):
        self.count = 0

    def update(self, features: torch.Tensor) -> None:
        """Add features of shape (n, dim)."""
        features = features.double()
        if self.count == 0:
            if features.shape[1] > MAX_DIM:
                raise ValueError(f"{features.shape[1]} dimensions are too many for a covariance; at most {MAX_DIM}.")
            self.origin = features.mean(0)
            self.sum = torch.zeros_like(self.origin)
            self.outer = torch.zeros(len(self.origin), len(self.origin), dtype=torch.float64, device=features.device)
        centered = features - self.origin
        self.sum += centered.sum(0)
        self.outer.addmm_(centered.T, centered)
        self.count += len(features)

    def result(self) -> GaussianStatistics:
        """Return the statistics of all features so far.

        Raises:
            ValueError: If there are fewer than two.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, not {self.count}.")
        mean = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return GaussianStatistics((self.origin + mean).cpu().numpy(), covariance.cpu().numpy(), self.count)


@dataclass
class FeatureSummary:
    """Summary of a set of images for metrics.

    Args:
        statistics: Kind of features -> their Gaussian.
        features: Pooled features, of all images or of a random subset.
        inception_score: Mean and standard deviation over the splits.
        provenance: Images, extractor and counts; empty for files without that record.
    """

    statistics: dict[str, GaussianStatistics] = field(default_factory=dict)
    features: Features | None = None
    inception_score: tuple[float, float] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def check_summary_path(path: Path) -> None:
    """Refuse a file that `save_summary` would not write.

    Raises:
        ValueError: If it exists, or has an ending other than `.safetensors` and `.npz`.
    """
    check_new(path, ".safetensors", ".npz")


def save_summary(path: Path, summary: FeatureSummary) -> None:
    """Write statistics, features and provenance to one `.safetensors` or `.npz` file.

    The arrays have ADM's names (`mu`, `sigma`, `mu_s`, `sigma_s`), so that other tools can read the `.npz`.

    Raises:
        ValueError: If the file exists or the ending is another.
    """
    check_summary_path(path)
    arrays: dict[str, Any] = {}
    for kind, statistics in summary.statistics.items():
        mean_key, covariance_key = STATISTICS_KEYS[kind]
        arrays |= {mean_key: statistics.mean, covariance_key: statistics.covariance}
    if summary.features is not None:
        arrays[FEATURES_KEY] = np.asarray(summary.features[:])
    provenance = json.dumps(valid_json(without_machine(summary.provenance)), allow_nan=False)
    if path.suffix == ".safetensors":
        write_atomically(path, lambda partial: save_file(arrays, partial, metadata={PROVENANCE_KEY: provenance}))
    else:
        arrays[PROVENANCE_KEY] = np.array(provenance)
        write_atomically(path, lambda partial: np.savez(partial, **arrays))


def without_machine(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose paths do not tell where it was made."""
    return {key: shorten_path(value) for key, value in provenance.items()}


def load_summary(path: Path) -> FeatureSummary:
    """Read what `save_summary` or ADM's tools wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds no statistics or some that make no sense, or is a `.pkl`.
    """
    _refuse_pickle(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        arrays, provenance = (_read_safetensors if path.suffix == ".safetensors" else _read_npz)(path)
    except (ArrayError, MemoryError):
        raise
    except Exception as error:  # zipfile, NumPy and safetensors raise many kinds for damaged files
        raise ValueError(f"{path} cannot be read: {error}") from error
    _check_provenance(path, provenance)
    statistics = {}
    for kind, (mean_key, covariance_key) in STATISTICS_KEYS.items():
        if mean_key not in arrays or covariance_key not in arrays:
            continue
        mean, covariance = (np.asarray(arrays[key], dtype=np.float64) for key in (mean_key, covariance_key))
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: {mean_key} {mean.shape} and {covariance_key} {covariance.shape} do not fit.")
        statistics[kind] = GaussianStatistics(mean, covariance, provenance.get("count"))
        try:
            statistics[kind].check()
        except ValueError as error:
            raise ValueError(f"{path}: {mean_key} and {covariance_key}: {error}") from error
    if "pool" not in statistics:
        raise ValueError(f"{path} holds no statistics (mu and sigma); it has {', '.join(arrays) or 'nothing'}.")
    features = arrays.get(FEATURES_KEY)
    if features is not None:
        if features.ndim != 2 or not len(features) or features.shape[1:] != arrays["mu"].shape:
            raise ValueError(f"{path}: {FEATURES_KEY} of shape {features.shape} do not fit its statistics.")
        for start in range(0, len(features), 4096):
            if not np.isfinite(features[start : start + 4096]).all():
                raise ValueError(f"{path}: its {FEATURES_KEY} hold values that are NaN or infinite.")
    return FeatureSummary(statistics, features, provenance=provenance)


def _check_provenance(path: Path, provenance: Any) -> None:
    """Refuse a record whose values are not of the types that `summarize` gives them."""
    texts = ("images", "format", "preparation", "extractor", "resize", "weights")
    fits = isinstance(provenance, dict)
    if fits:
        count, shape = provenance.get("count", 1), provenance.get("shape", [])
        fits = (
            all(isinstance(provenance.get(key, ""), str) for key in texts)
            and isinstance(count, int)
            and count > 0
            and isinstance(shape, list)
            and all(isinstance(side, int) for side in shape)
        )
    if not fits:
        raise ValueError(f"{path}: its {PROVENANCE_KEY} is not what eval/make_reference.py writes.")


def has_statistics(path: Path) -> bool:
    """Return whether a file holds statistics rather than images.

    Raises:
        ValueError: If the file is a damaged `.npz`, or a `.pkl`.
    """
    _refuse_pickle(path)
    if path.suffix.lower() == ".npz" and path.is_file():
        return "mu" in names_in_npz(path)
    return path.suffix == ".safetensors"


def names_in_npz(path: Path) -> list[str]:
    """Return the names of the arrays in an `.npz` file.

    Raises:
        ValueError: If it is damaged; names it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except Exception as error:  # zipfile raises many kinds for damaged files
        raise ValueError(f"{path} is not a complete .npz file: {error}") from error


def _refuse_pickle(path):
    if path.suffix.lower() == ".pkl":
        raise ValueError(
            f"{path} is a pickle, such as EDM2's references, and would run any code it contains: make statistics of "
            'the same images by eval/make_reference.py, or save its arrays in EDM2 by numpy.savez("x.npz", '
            'mu=stats["fid"]["mu"], sigma=stats["fid"]["sigma"]) and name that file.'
        )


class ArrayError(ValueError):
    """An array of a file has a type or a size that none of its name has; the message names both."""


def _read_safetensors(path):
    with safe_open(path, framework="pt") as file:
        arrays = {}
        for key in (key for key in KNOWN_KEYS if key in file.keys()):  # noqa: SIM118  (it is not a dictionary)
            found = file.get_slice(key)
            is_float = found.get_dtype() in ("F64", "F32", "F16", "BF16")
            _check_array(path, key, tuple(found.get_shape()), is_float, found.get_dtype())
            tensor = file.get_tensor(key)
            arrays[key] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return arrays, json.loads((file.metadata() or {}).get(PROVENANCE_KEY, "{}"))


def _read_npz(path):
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        keys = [key for key in (*KNOWN_KEYS, PROVENANCE_KEY) if f"{key}.npy" in archive.namelist()]
        for key in keys:  # the headers of all, before memory is asked for
            with archive.open(f"{key}.npy") as member:
                version = np.lib.format.read_magic(member)
                shape, _, dtype = _READ_HEADER[version[0]](member)
            if key != PROVENANCE_KEY:
                _check_array(path, key, shape, dtype.kind == "f", dtype)
            elif dtype.kind != "U" or shape != () or dtype.itemsize > MAX_TEXT_BYTES:
                raise ArrayError(f"{path}: its {PROVENANCE_KEY} is not what eval/make_reference.py writes.")
        for key in keys:
            if key == FEATURES_KEY:
                arrays[key] = map_npz_array(path, key)
            else:
                with archive.open(f"{key}.npy") as member:
                    arrays[key] = np.lib.format.read_array(member, allow_pickle=False)
    provenance = arrays.pop(PROVENANCE_KEY, None)
    return arrays, {} if provenance is None else json.loads(str(provenance))


def _check_array(path: Path, key: str, shape: tuple[int, ...], is_float: bool, dtype: Any) -> None:
    """Refuse an array that is not of real numbers, or larger than any that this package writes."""
    if not is_float:
        raise ArrayError(f"{path}: {key} is of type {dtype}, not floating-point numbers.")
    limits = (MAX_FEATURES, MAX_DIM) if key == FEATURES_KEY else (MAX_DIM, MAX_DIM)
    if len(shape) > 2 or any(size > limit for size, limit in zip(shape, limits, strict=False)):
        raise ArrayError(f"{path}: {key} of shape {shape} is too large.")
