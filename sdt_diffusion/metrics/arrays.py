"""What metrics take as features: arrays in memory, or on disk."""

import numpy as np
import torch

from .feature_file import FeatureFile

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
