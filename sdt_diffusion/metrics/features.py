"""Summaries of sets of images for metrics: features, their Gaussians, and the record of how they were made."""

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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..data.raw_images import map_npz_array
from ..utils.files import check_new, write_atomically

#: Kind of features -> names of mean and covariance in a file, as in ADM's reference statistics.
STATISTICS_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
FEATURES_KEY = "features"
PROVENANCE_KEY = "provenance"
#: Errors that NumPy raises for a damaged `.npz`.
NPZ_ERRORS = (zipfile.BadZipFile, OSError, ValueError, EOFError)


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
        self.shape = (rows, dim)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (lives as long as the object)

    def __del__(self):
        if hasattr(self, "_file"):  # not if it could not be made
            self._file.close()

    def __len__(self) -> int:
        return self.shape[0]

    def append(self, features: np.ndarray) -> None:
        """Add features of shape (n, dim)."""
        self._file.write(np.ascontiguousarray(features, dtype=np.float32).tobytes())

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        self._file.flush()
        size = 4 * self.shape[1]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            data = os.pread(self._file.fileno(), (stop - start) * size, start * size)
        else:
            data = b"".join(os.pread(self._file.fileno(), size, int(row) * size) for row in rows)
        return np.frombuffer(data, dtype=np.float32).reshape(-1, self.shape[1])


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
            ValueError: If the covariance is not finite, or has negative eigenvalues.
        """
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("The statistics hold values that are NaN or infinite.")
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
    provenance = json.dumps(summary.provenance)
    if path.suffix == ".safetensors":
        write_atomically(path, lambda partial: save_file(arrays, partial, metadata={PROVENANCE_KEY: provenance}))
    else:
        arrays[PROVENANCE_KEY] = np.array(provenance)
        write_atomically(path, lambda partial: np.savez(partial, **arrays))


def load_summary(path: Path) -> FeatureSummary:
    """Read what `save_summary` or ADM's tools wrote.

    Raises:
        ValueError: If the file is damaged, holds no statistics, or is a `.pkl`.
    """
    _refuse_pickle(path)
    try:
        arrays, provenance = (_read_safetensors if path.suffix == ".safetensors" else _read_npz)(path)
    except (SafetensorError, *NPZ_ERRORS) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(provenance, dict) or not isinstance(provenance.get("count", 0), int):
        raise ValueError(f"{path}: its {PROVENANCE_KEY} is not what eval/make_reference.py writes.")
    statistics = {}
    for kind, (mean_key, covariance_key) in STATISTICS_KEYS.items():
        if mean_key not in arrays or covariance_key not in arrays:
            continue
        mean, covariance = (np.asarray(arrays[key], dtype=np.float64) for key in (mean_key, covariance_key))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: {mean_key} {mean.shape} and {covariance_key} {covariance.shape} do not fit.")
        statistics[kind] = GaussianStatistics(mean, covariance, provenance.get("count"))
        try:
            statistics[kind].check()
        except ValueError as error:
            raise ValueError(f"{path}: {mean_key} and {covariance_key}: {error}") from error
    if "pool" not in statistics:
        raise ValueError(f"{path} holds no statistics (mu and sigma); it has {', '.join(arrays) or 'nothing'}.")
    features = arrays.get(FEATURES_KEY)
    if features is not None and (features.ndim != 2 or features.shape[1:] != arrays["mu"].shape):
        raise ValueError(f"{path}: {FEATURES_KEY} of shape {features.shape} do not fit its statistics.")
    return FeatureSummary(statistics, features, provenance=provenance)


def has_statistics(path: Path) -> bool:
    """Return whether a file holds statistics rather than images.

    Raises:
        ValueError: If the file is a damaged `.npz`, or a `.pkl`.
    """
    _refuse_pickle(path)
    if path.suffix == ".npz" and path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                return "mu.npy" in archive.namelist()
        except NPZ_ERRORS as error:
            raise ValueError(f"{path} is not a complete .npz file: {error}") from error
    return path.suffix == ".safetensors"


def _refuse_pickle(path):
    if path.suffix.lower() == ".pkl":
        raise ValueError(
            f"{path} is a pickle, such as EDM2's references, and would run any code it contains: make statistics of "
            'the same images by eval/make_reference.py, or save its arrays in EDM2 by numpy.savez("x.npz", '
            'mu=stats["fid"]["mu"], sigma=stats["fid"]["sigma"]) and name that file.'
        )


def _read_safetensors(path):
    with safe_open(path, framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is not a dictionary)
        return arrays, json.loads((file.metadata() or {}).get(PROVENANCE_KEY, "{}"))


def _read_npz(path):
    with np.load(path) as archive:  # refuses pickled objects
        known = [key for pair in STATISTICS_KEYS.values() for key in pair if key in archive.files]
        arrays = {key: archive[key] for key in known}
        provenance = json.loads(str(archive[PROVENANCE_KEY])) if PROVENANCE_KEY in archive.files else {}
        if FEATURES_KEY in archive.files:
            arrays[FEATURES_KEY] = map_npz_array(path, FEATURES_KEY)
    return arrays, provenance
