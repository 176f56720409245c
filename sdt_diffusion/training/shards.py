"""Tensors that FSDP2 has spread over processes, and whole ones; all processes call these functions together."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory that this process has of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Spread a whole tensor, which every process has, as `target` is."""
    if not isinstance(target, DTensor):
        return whole
    whole = whole.to(target.device)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)  # sends nothing


def copy_full(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    target.copy_(shard_like(source, target))
