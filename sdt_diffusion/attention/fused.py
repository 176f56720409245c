"""Triton backend: fused attention that computes the decay in registers and keeps no (tokens, tokens) tensor."""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch

from .formula import Decay

#: Head sizes that the kernels were tested with and have registers for.
HEAD_SIZES = range(16, 129)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """Sizes of a kernel's blocks, and how it is compiled.

    Args:
        block_m: Queries of a block.
        block_n: Keys of a block.
        d0: Columns of a head in its first part, a power of two.
        d1: Columns of the rest, 0 or a power of two.
        num_warps: Warps of a block.
        num_stages: Stages of its pipeline.
    """

    block_m: int
    block_n: int
    d0: int
    d1: int
    num_warps: int
    num_stages: int


@functools.cache
def launch_for(kernel: str, head_dim: int, tokens: int) -> Launch:
    """Choose the sizes of a kernel's blocks: for long grids those that fit into registers on sm_80, sm_90 and sm_100.

    Args:
        kernel: "forward", "backward_query" or "backward_key".
        head_dim: Size of a head.
        tokens: Tokens that attend to each other.
    """
    d0 = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - d0
    d1 = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    block_m, block_n, num_warps = {
        "forward": (128, 32, 4) if head_dim <= 64 else (128, 32, 8),
        "backward_query": (64, 32, 4) if head_dim <= 64 else (64, 32, 8),
        "backward_key": (32, 64, 8),
    }[kernel]
    smallest = max(16, 1 << (tokens - 1).bit_length())  # short rows need no larger block
    return Launch(min(block_m, smallest), min(block_n, smallest), d0, d1, num_warps, 2)


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: Decay, scale: float
) -> torch.Tensor:
    """Compute spatial decay attention by one kernel, in memory that grows with the tokens only.

    Its results are the same bits on every run: each number is added up by one program, in one order.

    Raises:
        ValueError: If the kernels cannot compute it here; says why.
    """
    check_support(query, value)
    height, width = decay.grid_size
    places = torch.arange(height * width, device=query.device)
    y, x = (places // width).float()[None], (places % width).float()[None]  # (1, N) each
    half_decay = (decay.gate * (decay.alpha[:, None] / 2)).float().contiguous()  # (B, h, N)
    tensors = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    return _forward(*tensors, half_decay, y, x, 1, 0, 1, scale, decay.variant == "content")[0]


def check_support(query: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse what the kernels cannot compute.

    Raises:
        ValueError: Says why.
    """
    head_dim = query.shape[-1]
    if importlib.util.find_spec("triton") is None:
        raise ValueError("The backend 'triton' needs the package triton, which comes with torch on Linux.")
    if head_dim not in HEAD_SIZES or value.shape[-1] != head_dim:
        raise ValueError(
            f"The backend 'triton' needs heads of {HEAD_SIZES[0]} to {HEAD_SIZES[-1]} columns, the same for query and "
            f"value, not {head_dim} and {value.shape[-1]}."
        )
    if query.dtype not in DTYPES:
        raise ValueError(f"The backend 'triton' takes float32, bfloat16 and float16, not {query.dtype}.")


# A compiler sees one operator, forward and backward. The groups are explained in `triton_kernels`.


@torch.library.custom_op("sdt_diffusion::fused_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half_decay: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    groups: int,
    group_stride: int,
    token_stride: int,
    scale: float,
    clamp: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, and log2 of the softmax's denominators, shape (batch, heads, tokens)."""
    import triton

    from . import triton_kernels

    if query.device.type == "cpu" and not triton.knobs.runtime.interpret:  # a compiler cannot look it up
        raise ValueError("The backend 'triton' needs a GPU; on CPUs it runs in Triton's interpreter only, for tests.")

    batch, heads, all_tokens, head_dim = query.shape
    tokens = all_tokens // groups
    launch = launch_for("forward", head_dim, tokens)
    output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    log_sum = torch.empty(half_decay.shape, dtype=torch.float32, device=value.device)
    strides = [stride for tensor in (query, key, value, output) for stride in tensor.stride()[:3]]
    triton_kernels.forward_kernel[(_blocks(tokens, launch.block_m), batch * heads * groups)](
        *(query, key, value, output, log_sum, half_decay, y, x),
        *strides,
        *(_batch_stride(y), heads, groups, tokens, all_tokens, group_stride, token_stride, scale),
        **_constants(launch, query, clamp),
    )
    return output, log_sum


@_forward.register_fake
def _(query, key, value, half_decay, y, x, groups, group_stride, token_stride, scale, clamp):
    return value.new_empty(value.shape), half_decay.new_empty(half_decay.shape, dtype=torch.float32)


@torch.library.custom_op("sdt_diffusion::fused_attention_backward", mutates_args=())
def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half_decay: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    output: torch.Tensor,
    log_sum: torch.Tensor,
    groups: int,
    group_stride: int,
    token_stride: int,
    scale: float,
    clamp: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key, value and half_decay."""
    from . import triton_kernels

    batch, heads, all_tokens, head_dim = query.shape
    tokens = all_tokens // groups
    row_sum = (grad_output.float() * output.float()).sum(dim=-1)  # (B, h, N)
    grad_query, grad_key, grad_value = (
        torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (query, key, value)
    )
    grad_half_decay = torch.empty_like(half_decay)
    tensors = (query, key, value, grad_output, row_sum, log_sum, half_decay, y, x)
    strides = [stride for tensor in (query, key, value, grad_output) for stride in tensor.stride()[:3]]
    numbers = (_batch_stride(y), heads, groups, tokens, all_tokens, group_stride, token_stride, scale)
    pairs = batch * heads * groups
    launch = launch_for("backward_query", head_dim, tokens)
    triton_kernels.backward_query_kernel[(_blocks(tokens, launch.block_m), pairs)](
        *tensors, grad_query, grad_half_decay, *strides, *numbers, **_constants(launch, query, clamp)
    )
    launch = launch_for("backward_key", head_dim, tokens)
    triton_kernels.backward_key_kernel[(_blocks(tokens, launch.block_n), pairs)](
        *tensors, grad_key, grad_value, grad_half_decay, *strides, *numbers, **_constants(launch, query, clamp)
    )
    return grad_query, grad_key, grad_value, grad_half_decay


@_backward.register_fake
def _(grad_output, query, key, value, half_decay, *rest):
    return *(tensor.new_empty(tensor.shape) for tensor in (query, key, value)), torch.empty_like(half_decay)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.groups, ctx.group_stride, ctx.token_stride, ctx.scale, ctx.clamp = inputs
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, grad_output, grad_log_sum):
    grad_output = grad_output.to(ctx.saved_tensors[2].dtype)
    grad_output = grad_output if grad_output.stride(-1) == 1 else grad_output.contiguous()
    numbers = (ctx.groups, ctx.group_stride, ctx.token_stride, ctx.scale, ctx.clamp)
    return *_backward(grad_output, *ctx.saved_tensors, *numbers), *[None] * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _blocks(tokens: int, size: int) -> int:
    return -(-tokens // size)


def _batch_stride(coordinates: torch.Tensor) -> int:
    """Return 0 if all samples have the same coordinates."""
    return coordinates.stride(0) if len(coordinates) > 1 else 0


def _constants(launch: Launch, query: torch.Tensor, clamp: bool) -> dict[str, Any]:
    return {
        "D": query.shape[-1],
        "D0": launch.d0,
        "D1": launch.d1,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "CLAMP": clamp,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",  # tf32 has no effect on half precision
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
