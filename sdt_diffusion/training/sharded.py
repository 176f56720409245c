"""Tensors of which FSDP2 keeps a part in each process; others are what they are."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; all processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        source = source.to(target.device)  # every process has read the whole: none needs sending
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)
