"""Features that are too many for memory."""

import tempfile
from pathlib import Path

import numpy as np


class FeatureFile:
    """A float32 array of features in a nameless temporary file, which vanishes with the process however that ends.

    Read by slices or index arrays, like the array it stands for; each reading maps the file anew, so that memory holds
    only what was asked for.

    Args:
        folder: On which disk the file should be.
        rows: Number of features.
        dim: Their dimension.
    """

    def __init__(self, folder: Path, rows: int, dim: int):
        self.shape = (rows, dim)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (lives as long as the object)

    def __len__(self) -> int:
        return self.shape[0]

    def append(self, features: np.ndarray) -> None:
        """Adds features of shape (n, dim)."""
        self._file.write(np.ascontiguousarray(features, dtype=np.float32).tobytes())

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        self._file.flush()
        return np.array(np.memmap(self._file, dtype=np.float32, mode="r", shape=self.shape)[rows])
