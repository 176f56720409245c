"""What metrics need to know of a set of images: statistics and features, with the record of how they came about."""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..data.raw_images import map_npz_array
from ..utils.files import check_new, write_atomically
from .features import Features
from .frechet import GaussianStatistics

#: Kind of features -> names of mean and covariance in a file, those of ADM's reference statistics.
STATISTICS_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
FEATURES_KEY = "features"
PROVENANCE_KEY = "provenance"
#: What a damaged `.npz` makes NumPy raise.
NPZ_ERRORS = (zipfile.BadZipFile, OSError, ValueError, EOFError)


@dataclass
class FeatureSummary:
    """What is known of a set of images.

    Args:
        statistics: Kind of features -> their Gaussian.
        features: Pooled features, of all images or of a random subset.
        inception_score: Mean and standard deviation over the splits.
        provenance: Images, extractor and counts; empty for files that do not say.
    """

    statistics: dict[str, GaussianStatistics] = field(default_factory=dict)
    features: Features | None = None
    inception_score: tuple[float, float] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def check_summary_path(path: Path) -> None:
    """Refuses a file that `save_summary` would not write.

    Raises:
        ValueError: If it exists, or has an ending other than `.safetensors` and `.npz`.
    """
    check_new(path, ".safetensors", ".npz")


def save_summary(path: Path, summary: FeatureSummary) -> None:
    """Writes statistics, features and provenance to one `.safetensors` or `.npz` file, by its ending.

    The arrays have ADM's names (`mu`, `sigma`, `mu_s`, `sigma_s`), so that others' tools read the `.npz`.

    Raises:
        ValueError: If the file exists or the ending is another.
    """
    check_summary_path(path)
    arrays = {}
    for kind, statistics in summary.statistics.items():
        mean_key, covariance_key = STATISTICS_KEYS[kind]
        arrays |= {mean_key: statistics.mean, covariance_key: statistics.covariance}
    if summary.features is not None:
        arrays[FEATURES_KEY] = np.asarray(summary.features[:])
    provenance = json.dumps(summary.provenance)
    if path.suffix == ".safetensors":
        write_atomically(path, lambda partial: save_file(arrays, partial, metadata={PROVENANCE_KEY: provenance}))
    else:
        write_atomically(path, lambda partial: np.savez(partial, **arrays, **{PROVENANCE_KEY: np.array(provenance)}))


def load_summary(path: Path) -> FeatureSummary:
    """Reads what `save_summary` or ADM's tools wrote.

    Raises:
        ValueError: If the file is damaged or holds no statistics.
    """
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
    """Whether a file is one of statistics, rather than of images."""
    if path.suffix == ".npz" and path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                return "mu.npy" in archive.namelist()
        except NPZ_ERRORS as error:
            raise ValueError(f"{path} is no whole .npz file: {error}") from error
    return path.suffix == ".safetensors"


def _read_safetensors(path):
    with safe_open(path, framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is not a dictionary)
        return arrays, json.loads((file.metadata() or {}).get(PROVENANCE_KEY, "{}"))


def _read_npz(path):
    with np.load(path) as archive:  # without pickles
        known = [key for pair in STATISTICS_KEYS.values() for key in pair if key in archive.files]
        arrays = {key: archive[key] for key in known}
        provenance = json.loads(str(archive[PROVENANCE_KEY])) if PROVENANCE_KEY in archive.files else {}
        if FEATURES_KEY in archive.files:
            arrays[FEATURES_KEY] = map_npz_array(path, FEATURES_KEY)
    return arrays, provenance
