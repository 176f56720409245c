"""Distances on the patch grid."""

import torch


def manhattan_distance(
    grid_size: tuple[int, int], device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Manhattan distance between all pairs of tokens of a grid.

    d_ij = |y_i - y_j| + |x_i - x_j| with token n at row y = n // W and column x = n % W (raster order).

    Args:
        grid_size: Rows H and columns W of the patch grid.
        device: Device of the result.
        dtype: Data type of the result.

    Returns:
        Tensor of shape (H*W, H*W), in units of patches.
    """
    height, width = grid_size
    y = torch.arange(height, device=device, dtype=dtype)
    x = torch.arange(width, device=device, dtype=dtype)
    rows = (y[:, None] - y[None, :]).abs()
    columns = (x[:, None] - x[None, :]).abs()
    return (rows[:, None, :, None] + columns[None, :, None, :]).reshape(height * width, height * width)
