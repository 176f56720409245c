"""Triton backend: fused attention that computes the decay in registers and keeps no (tokens, tokens) tensor."""

import importlib.util
from typing import Any

import torch

from .formula import Decay
from .launch import Launch, choose_launch
from .pruning import needed_tiles, tile_order

#: Head sizes that the kernels were tested with and have registers for.
HEAD_SIZES = range(16, 129)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: Decay,
    scale: float,
    decomposed: bool = False,
    coordinates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute spatial decay attention by one kernel, in memory that grows with the tokens only.

    Its results are the same bits on every run: each number is added up by one program, in one order.

    Args:
        query: Shape (batch, heads, tokens, head_dim), of any strides.
        key: The same shape and dtype.
        value: The same shape and dtype.
        decay: The spatial decay, of any variant but `raster`. Tiles of 64 keys are skipped as `pruning` describes if
            its `prune_eps` is above 0, the same in the backward pass.
        scale: Factor of Q K^T.
        decomposed: Attend inside each row, then inside each column of that result; nothing is copied. Rows and
            columns are short, and are never pruned.
        coordinates: Row and column of each token, shape (batch or 1, tokens, 2), where the tokens are not the whole
            grid in raster order; not for decomposed or pruned attention. It gets no gradient.

    Raises:
        ValueError: If the kernels cannot compute it here; says why.
    """
    check_support(query, value)
    _check_inputs(query, key, value, decay, decomposed, coordinates)
    height, width = decay.grid_size
    half_decay = (decay.gate * (decay.alpha[:, None] / 2)).float().contiguous()  # (B, h, N)
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    clamp = decay.variant == "content"
    if decomposed:
        rows, columns = [height, width, 1], [width, 1, width]
        value, _ = _forward(query, key, value, half_decay, None, None, None, width, rows, scale, clamp)
        return _forward(query, key, value, half_decay, None, None, None, width, columns, scale, clamp)[0]
    order = needed = None
    if coordinates is not None:
        coordinates = coordinates.detach().float().contiguous()
    elif decay.prune_eps > 0:
        order = tile_order(decay.grid_size, query.device).int()
        needed = _needed_tiles(query, key, half_decay, decay, order, scale)
    return _forward(query, key, value, half_decay, coordinates, order, needed, width, [1, 0, 1], scale, clamp)[0]


def check_support(query: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse what the kernels cannot compute.

    Raises:
        ValueError: Says why.
    """
    head_dim = query.shape[-1]
    if importlib.util.find_spec("triton") is None:
        raise ValueError("The backend 'triton' needs the package triton, which comes with torch on Linux.")
    if not HEAD_SIZES[0] <= head_dim <= HEAD_SIZES[-1] or value.shape[-1] != head_dim:  # `in` stops a compiler
        raise ValueError(
            f"The backend 'triton' needs heads of {HEAD_SIZES[0]} to {HEAD_SIZES[-1]} columns, the same for query and "
            f"value, not {head_dim} and {value.shape[-1]}."
        )
    if query.dtype not in DTYPES:
        raise ValueError(f"The backend 'triton' takes float32, bfloat16 and float16, not {query.dtype}.")


def _check_inputs(query, key, value, decay, decomposed, coordinates):
    """Refuse tensors that do not fit together, as kernels would read beyond them."""
    batch, heads, tokens, _ = query.shape
    if not query.shape == key.shape == value.shape or not query.dtype == key.dtype == value.dtype:
        shown = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in (query, key, value))
        raise ValueError(f"The backend 'triton' needs query, key and value of one shape and dtype, not {shown}.")
    if decay.variant == "raster":
        raise ValueError("The backend 'triton' cannot compute the variant 'raster': use the backend 'reference'.")
    if decay.gate.shape != (batch, heads, tokens) or decay.alpha.shape != (heads,):
        raise ValueError(
            f"`gate` and `alpha` have shapes {tuple(decay.gate.shape)} and {tuple(decay.alpha.shape)}; "
            f"({batch}, {heads}, {tokens}) and ({heads},) are needed."
        )
    if coordinates is None:
        height, width = decay.grid_size
        if height * width != tokens:
            raise ValueError(f"grid_size {height}x{width} means {height * width} tokens, but query has {tokens}.")
        return
    if coordinates.shape not in ((1, tokens, 2), (batch, tokens, 2)):
        raise ValueError(f"`coordinates` has shape {tuple(coordinates.shape)}; ({batch} or 1, {tokens}, 2) is needed.")
    if decomposed or decay.prune_eps > 0:
        raise ValueError(
            "Decomposed and pruned attention need the whole grid: pass no `coordinates`, or neither of the two."
        )


def _needed_tiles(query, key, half_decay, decay, order, scale):
    places = torch.arange(query.shape[2], device=query.device)
    width = decay.grid_size[1]
    coordinates = torch.stack([places // width, places % width], dim=-1)  # (N, 2)
    tensors = (query.detach(), key.detach(), half_decay.detach())
    with torch.autocast(query.device.type, enabled=False):  # the bound does not hold for rounded products
        return needed_tiles(*tensors, coordinates, order, scale, decay.prune_eps, decay.variant == "content")


# A compiler sees one operator, forward and backward. The groups are explained in `triton_kernels`: their number, their
# stride and that of the tokens in them.


@torch.library.custom_op("sdt_diffusion::fused_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half_decay: torch.Tensor,
    coordinates: torch.Tensor | None,
    order: torch.Tensor | None,
    needed: torch.Tensor | None,
    width: int,
    groups: list[int],
    scale: float,
    clamp: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, and log2 of the softmax's denominators, shape (batch, heads, tokens), in the given order."""
    import triton

    if query.device.type == "cpu" and not triton.knobs.runtime.interpret:  # a compiler cannot look it up
        raise ValueError("The backend 'triton' needs a GPU; on CPUs it runs in Triton's interpreter only, for tests.")

    half_decay = _ordered(half_decay, order)
    output = _result_like(value)
    log_sum = torch.empty_like(half_decay)
    lists = None if needed is None else _lists(needed)
    arguments = (query, key, value, output, log_sum, half_decay, coordinates, order, lists)
    numbers = _numbers((query, key, value), coordinates, width, groups, scale)
    _run("forward", query, groups, clamp, needed is not None, *arguments, *numbers)
    return output, log_sum


@_forward.register_fake
def _(query, key, value, half_decay, coordinates, order, needed, width, groups, scale, clamp):
    return _result_like(value), torch.empty_like(half_decay)


@torch.library.custom_op("sdt_diffusion::fused_attention_backward", mutates_args=())
def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half_decay: torch.Tensor,
    coordinates: torch.Tensor | None,
    order: torch.Tensor | None,
    needed: torch.Tensor | None,
    output: torch.Tensor,
    log_sum: torch.Tensor,
    width: int,
    groups: list[int],
    scale: float,
    clamp: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key, value and half_decay."""
    half_decay = _ordered(half_decay, order)
    grad_query, grad_key, grad_value = (_result_like(each) for each in (query, key, value))
    exact_delta, row_sums, grad_half_decay = (torch.empty_like(half_decay) for _ in range(3))
    numbers = _numbers((query, key, value, grad_output), coordinates, width, groups, scale)
    pruned = needed is not None
    lists = None if needed is None else _lists(needed)
    arguments = [query, key, value, output, grad_output, log_sum, half_decay, coordinates, order, lists]
    _run("backward_query", query, groups, clamp, pruned, *arguments, grad_query, exact_delta, row_sums, *numbers)
    lists = None if needed is None else _lists(needed.transpose(-1, -2))
    arguments = [query, key, value, grad_output, exact_delta, log_sum, half_decay, coordinates, order, lists]
    arguments += [grad_key, grad_value, row_sums, grad_half_decay]
    _run("backward_key", query, groups, clamp, pruned, *arguments, *numbers)
    return grad_query, grad_key, grad_value, _ordered(grad_half_decay, None if order is None else order.argsort())


@_backward.register_fake
def _(grad_output, query, key, value, half_decay, *rest):
    return *(_result_like(each) for each in (query, key, value)), torch.empty_like(half_decay)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.width, ctx.groups, ctx.scale, ctx.clamp = inputs
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, grad_output, grad_log_sum):
    tensors = ctx.saved_tensors  # once, as activation checkpointing demands
    grad_output = grad_output.to(tensors[2].dtype)
    grad_output = grad_output if grad_output.stride(-1) == 1 else grad_output.contiguous()
    return *_backward(grad_output, *tensors, ctx.width, ctx.groups, ctx.scale, ctx.clamp), *[None] * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _result_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return memory for a result: contiguous with the heads behind the tokens, as models join them."""
    batch, heads, tokens, head_dim = tensor.shape
    return tensor.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


def _ordered(numbers: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return numbers if order is None else numbers.index_select(-1, order)


def _lists(needed: torch.Tensor) -> torch.Tensor:
    """Return, for each tile, how many tiles it needs, and their numbers in order; shape (batch, heads, T, 1 + T)."""
    numbers = needed.byte().argsort(dim=-1, descending=True, stable=True)
    return torch.cat([needed.sum(dim=-1, keepdim=True), numbers], dim=-1).int()


def _numbers(tensors, coordinates, width, groups, scale):
    """Return the kernels' numbers: strides of the tensors, and sizes."""
    _, heads, tokens, _ = tensors[0].shape
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    coordinate_batch = coordinates.stride(0) if coordinates is not None and len(coordinates) > 1 else 0
    return *strides, coordinate_batch, width, heads, tokens // groups[0], tokens, *groups, scale


def _run(name: str, query: torch.Tensor, groups: list[int], clamp: bool, pruned: bool, *arguments: Any):
    """Run a kernel, one program for each block of each group, head and sample."""
    from . import triton_kernels

    batch, heads, tokens, head_dim = query.shape
    tokens //= groups[0]
    kernel = getattr(triton_kernels, f"{name}_kernel")

    def start(launch: Launch) -> None:
        constants = kernel_constants(head_dim, query.dtype, clamp, launch)
        blocks = -(-tokens // (launch.block_n if name == "backward_key" else launch.block_m))
        kernel[(blocks * groups[0] * batch * heads,)](*arguments, **constants)

    with torch.cuda.device_of(query):
        start(choose_launch(name, query, tokens, pruned, start))


def kernel_constants(head_dim: int, dtype: torch.dtype, clamp: bool, launch: Launch) -> dict[str, Any]:
    """Return what a kernel is compiled for."""
    d0 = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - d0
    return {
        "D": head_dim,
        "D0": d0,
        "D1": max(16, 1 << (rest - 1).bit_length()) if rest else 0,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "CLAMP": clamp,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # tf32 has no effect on half precision
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
