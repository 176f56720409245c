"""Features that are too many for memory."""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch


class FeatureFile:
    """A float32 array of features in a nameless temporary file, which vanishes with the process however that ends.

    Read by slices or index arrays, like the array it stands for. Memory holds only what was asked for, which would not
    be so of a mapped file, whose pages come with their neighbors.

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
        size = 4 * self.shape[1]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            data = os.pread(self._file.fileno(), (stop - start) * size, start * size)
        else:
            data = b"".join(os.pread(self._file.fileno(), size, int(row) * size) for row in rows)
        return np.frombuffer(data, dtype=np.float32).reshape(-1, self.shape[1])


#: Shape (n, dim).
Features = np.ndarray | torch.Tensor | FeatureFile


def rows_of(features: Features, rows: slice | np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Some of the features as float64.

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
