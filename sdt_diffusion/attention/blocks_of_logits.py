"""What the blockwise backend computes its blocks of logits with, on CPUs.

Logits are in units of log 2, since torch computes `exp2` several times as fast as `exp` and `softmax` on some CPUs.
"""

import math
import threading

import torch

LOG2_E = 1 / math.log(2)


class Scratch(threading.local):
    """Memory that calls use again, since the system hands out fresh memory page by page, which is slow."""

    def __init__(self):
        self._buffers: dict[str, torch.Tensor] = {}

    def empty(self, name: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the uninitialized tensor `name`, which is valid until the next call with this name."""
        size = math.prod(shape) * dtype.itemsize
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[name][:size].view(dtype).view(shape)

    def copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy: products of matrices whose rows lie apart are slower."""
        return self.empty(name, *tensor.shape, dtype=tensor.dtype).copy_(tensor)


scratch = Scratch()


def start_logits(
    u_i: torch.Tensor, u_j: torch.Tensor, distance: torch.Tensor, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """Return (u_i + u_j) d_ij + shift, to which the products of query and key are added; valid until the next call."""
    shape = torch.broadcast_shapes(u_i.shape, u_j.shape)
    pair = torch.add(u_i, u_j, out=scratch.empty("logits", *shape, dtype=u_i.dtype))
    return pair.mul_(distance) if shift is None else torch.addcmul(shift, pair, distance, out=pair)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """Add factor * a @ b in place; operands of lower precision than the sum are multiplied in theirs."""
    low = _lower(a, b)
    if low == total.dtype:
        return total.baddbmm_(a, b, alpha=factor)
    return total.add_(a.to(low) @ b.to(low), alpha=factor)


def product(name: str, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a @ b in `dtype`, multiplied in the lower of their precisions; valid until the next of this name."""
    if a.dtype == b.dtype == dtype:
        return torch.bmm(a, b, out=scratch.empty(name, len(a), a.shape[1], b.shape[2], dtype=dtype))
    low = _lower(a, b)
    return (a.to(low) @ b.to(low)).to(dtype)


def _lower(a, b):
    return min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)


def weighted_mean(logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(logits) V, and log2 of the denominators; the logits, in units of log 2, are overwritten."""
    maximum = logits.amax(dim=-1, keepdim=True)  # (P, n, 1)
    weights = logits.sub_(maximum).exp2_()
    total = weights.sum(dim=-1, keepdim=True)
    result = product("result", weights, value, value.dtype).div_(total)  # (P, n, d)
    return result, (maximum + total.log2()).squeeze(-1)
