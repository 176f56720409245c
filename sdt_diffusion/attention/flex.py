"""Flex backend: torch's FlexAttention, which compiles the decay into a fused kernel.

Its backward pass sums the gate's gradient by atomic operations: in another order, and so with other bits, on each run.
"""

import functools

import torch
from torch.nn.attention.flex_attention import flex_attention

from .formula import Decay

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def flex_decay_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: Decay, scale: float
) -> torch.Tensor:
    """Compute spatial decay attention by FlexAttention.

    Its first call compiles the kernel, which takes seconds. On CPUs it has no backward pass.

    Raises:
        ValueError: If it cannot compute this; says why.
    """
    if query.dtype not in DTYPES:
        raise ValueError(f"The backend 'flex' takes float32, bfloat16 and float16, not {query.dtype}.")
    tensors = (query, key, value, decay.gate, decay.alpha)
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "The backend 'flex' has no backward pass on CPUs: choose another, or disable gradients by torch.no_grad()."
        )
    width, content = decay.grid_size[1], decay.variant == "content"
    half_decay, first = decay.gate * (decay.alpha[:, None] / 2), decay.num_registers  # (B, h, N)

    def add_decay(score, sample, head, i, j):
        y_i, y_j, x_i, x_j = (i - first) // width, (j - first) // width, (i - first) % width, (j - first) % width
        distance = (y_i - y_j).abs() + (x_i - x_j).abs()
        distance = distance.clamp(max=1) if content else distance
        decays = (half_decay[sample, head, i] + half_decay[sample, head, j]) * distance
        return score + (torch.where((i >= first) & (j >= first), decays, 0) if first else decays)

    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    return attend(query, key, value, score_mod=add_decay, scale=scale)


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)
