"""What the blockwise backend computes its blocks of logits with, on CPUs.

Logits are in units of log 2, since torch computes `exp2` several times as fast as `exp` and `softmax` on some CPUs.
"""

import functools
import math
import threading
from pathlib import Path

import torch

LOG2_E = 1 / math.log(2)
#: More multiply-adds of a pair of sample and head than these are worth the calls of oneDNN, one for each pair.
MKL_MULTIPLY_ADDS = 2**22


class Scratch(threading.local):
    """Memory that calls use again, since the system hands out fresh memory page by page, which is slow.

    Each thread has its own, as large as the largest block it has computed, and keeps it.
    """

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


def _prefers_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    multiply_adds = a.shape[1] * a.shape[2] * b.shape[2]
    return a.dtype == b.dtype == torch.float32 and multiply_adds > MKL_MULTIPLY_ADDS and _onednn_is_faster()


@functools.cache
def _onednn_is_faster() -> bool:
    """Return whether oneDNN multiplies large fp32 matrices faster than MKL, which has no AVX-512 for AMD's CPUs."""
    cpu = Path("/proc/cpuinfo")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and cpu.is_file()
        and "AuthenticAMD" in cpu.read_text()
    )


def product(
    name: str, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a @ b + bias.

    Args:
        name: The result is valid until the next one of this name.
        a: Shape (pairs, rows, inner).
        b: Shape (pairs, inner, columns). The factors are multiplied in the lower of their precisions.
        dtype: Data type of the result.
        bias: Shape (pairs, 1, columns).
    """
    low = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    if low != dtype:
        result = (a.to(low) @ b.to(low)).to(dtype)
        return result if bias is None else result.add_(bias)
    a, b = a.to(low), b.to(low)
    if _prefers_onednn(a, b):
        return _onednn_product(name, a, b, bias)
    place = scratch.empty(name, len(a), a.shape[1], b.shape[2], dtype=dtype)
    return torch.bmm(a, b, out=place) if bias is None else torch.baddbmm(bias, a, b, out=place)


def _onednn_product(name, a, b, bias=None, total=None):
    """Return a @ b + bias + total by torch's operators of oneDNN, which take one pair at a time."""
    results = []
    for i in range(len(a)):
        shift = None if bias is None else bias[i, 0]
        if total is None:
            results.append(torch.ops.mkldnn._linear_pointwise(a[i], b[i].T, shift, "none", [], ""))
        else:
            results.append(torch.ops.mkldnn._linear_pointwise.binary(a[i], total[i], b[i].T, shift, "add"))
    if len(results) == 1:
        return results[0][None]
    return torch.stack(results, out=scratch.empty(name, len(a), a.shape[1], b.shape[2], dtype=a.dtype))


def logits(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    u_i: torch.Tensor,
    u_j: torch.Tensor,
    distance: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return Q K^T scale + (u_i + u_j) d_ij + shift in units of log 2, shape (pairs, rows, columns).

    Args:
        query: Shape (pairs, rows, head_dim).
        key: Shape (pairs, columns, head_dim).
        scale: Factor of Q K^T.
        u_i: In units of log 2, shape (pairs, rows, 1).
        u_j: Likewise, shape (pairs, 1, columns).
        distance: Shape (rows, columns), or (pairs, rows, columns).
        shift: In units of log 2, shape (pairs, 1, columns).
    """
    # Half precision would round the products, to which the decay is added in fp32.
    shape, dtype = (*u_i.shape[:2], u_j.shape[2]), u_i.dtype
    query, key = query.to(dtype), key.to(dtype).transpose(1, 2)
    decay = torch.add(u_i, u_j, out=scratch.empty("decay", *shape, dtype=dtype))
    if _prefers_onednn(query, key):
        return _onednn_product("logits", query * (scale * LOG2_E), key, shift, decay.mul_(distance))
    decay = decay.mul_(distance) if shift is None else torch.addcmul(shift, decay, distance, out=decay)
    return decay.baddbmm_(query, key, alpha=scale * LOG2_E)


def weighted_mean(logits: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(logits) V, and log2 of the denominators; the logits, in units of log 2, are overwritten."""
    maximum = logits.amax(dim=-1, keepdim=True)  # (P, n, 1)
    weights = logits.sub_(maximum).exp2_()
    total = weights.sum(dim=-1, keepdim=True)
    result = product("result", weights, value, value.dtype).div_(total)  # (P, n, d)
    return result, (maximum + total.log2()).squeeze(-1)
