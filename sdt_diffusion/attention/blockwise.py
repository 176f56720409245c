"""Blockwise backend for CPUs: computes blocks of logits that fit into the cache, and keeps none of them.

With P the attention and S its logits: dS = P * (dP - sum_j dP P), and du_i = sum_j (dS_ij + dS_ji) d_ij.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from . import blockwise_pruned
from .blocks_of_logits import LOG2_E, logits, product, scratch, weighted_mean
from .formula import Decay, manhattan_distance
from .pruning import coordinates_of, needed_tiles, tile_order

#: Bytes of logits that each thread computes at a time; more where `MIN_ROWS` tokens of one head already need more.
BLOCK_BYTES = 2**21
MIN_ROWS = 64
#: Tokens of the largest grid whose distances are kept in memory, 64 MiB in fp32; those of 8 grids are kept.
MAX_CACHED_TOKENS = 4096
#: Fewer tokens are computed whole: bounds would take longer than what they save.
MIN_PRUNED_TOKENS = 2048
#: Above this fraction of needed tiles, computing all tiles is as fast as collecting those.
MAX_DENSITY = 0.7


def blockwise_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: Decay, scale: float
) -> torch.Tensor:
    """Compute spatial decay attention block by block, without keeping any logits.

    Raises:
        ValueError: If the tensors are not on a CPU.
    """
    if query.device.type != "cpu":
        raise ValueError(f"The backend 'blockwise' computes on CPUs, not on {query.device.type}: choose another.")
    if decay.prune_eps and query.shape[2] >= MIN_PRUNED_TOKENS:
        return pruned_attention(query, key, value, decay, scale)
    with torch.autocast(query.device.type, enabled=False):  # the operands already have the dtypes they need
        return _forward(query, key, value, decay.half_decay(), None, *decay.grid_size, decay.clamp, scale)[0]


def pruned_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: Decay, scale: float
) -> torch.Tensor:
    """Compute the attention without what `decay.prune_eps` allows to skip, on a grid of any size on a CPU."""
    half_decay, grid_size = decay.half_decay(), decay.grid_size
    with torch.autocast(query.device.type, enabled=False):
        tensors = (x.detach() for x in (query, key, half_decay))
        where = (coordinates_of(grid_size), tile_order(grid_size))
        needed = needed_tiles(*tensors, *where, scale, decay.prune_eps, decay.clamp)
        return _forward(query, key, value, half_decay, needed, *grid_size, decay.clamp, scale)[0]


# Registered as custom operators because a compiler would unroll the loops.


@torch.library.custom_op("sdt_diffusion::blockwise_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half_decay: torch.Tensor,
    needed: torch.Tensor | None,
    height: int,
    width: int,
    clamp: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, and log2 of the softmax's denominators, shape (batch, heads, tokens)."""
    if needed is not None and needed.float().mean() <= MAX_DENSITY:
        return blockwise_pruned.forward(query, key, value, half_decay, needed, (height, width), clamp, scale)
    output, log_sum = torch.empty_like(value), torch.empty_like(half_decay)
    for group in _groups(half_decay):
        q, k, v = (_load(name, x[group]) for name, x in (("q", query), ("k", key), ("v", value)))  # (P, N, d)
        u = half_decay[group].flatten(0, 1) * LOG2_E  # (P, N)
        for rows in _rows(half_decay):
            distance = _distances_from(rows, u.shape[1], height, width, clamp, u.dtype)  # (n, N)
            scores = logits(q[:, rows], k, scale, u[:, rows, None], u[:, None], distance)  # (P, n, N)
            result, sums = weighted_mean(scores, v)
            _store(output[group][:, :, rows], result)
            _store(log_sum[group][:, :, rows], sums)
    return output, log_sum


@torch.library.custom_op("sdt_diffusion::blockwise_attention_backward", mutates_args=())
def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half_decay: torch.Tensor,
    needed: torch.Tensor | None,
    output: torch.Tensor,
    log_sum: torch.Tensor,
    height: int,
    width: int,
    clamp: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients from recomputed attention, transposed: keys are rows, queries columns."""
    row_sum = (grad_output.to(half_decay.dtype) * output).sum(dim=-1)  # (B, h, N)
    if needed is not None and needed.float().mean() <= MAX_DENSITY:
        return blockwise_pruned.backward(
            grad_output, query, key, value, half_decay, needed, log_sum, row_sum, (height, width), clamp, scale
        )
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    grad_half_decay = torch.empty_like(half_decay)
    for group in _groups(half_decay):
        tensors = (("q", query), ("k", key), ("v", value), ("g", grad_output))
        q, k, v, g = (_load(name, x[group]) for name, x in tensors)  # (P, N, d)
        u = half_decay[group].flatten(0, 1) * LOG2_E  # (P, N)
        shift, minus_delta = (x[group].flatten(0, 1)[:, None].neg() for x in (log_sum, row_sum))  # (P, 1, N)
        grad_q, grad_u = scratch.empty("grad_q", *q.shape, dtype=u.dtype), torch.zeros_like(u)
        for rows in _rows(half_decay):
            distance = _distances_from(rows, u.shape[1], height, width, clamp, u.dtype)  # (n, N)
            scores = logits(k[:, rows], q, scale, u[:, rows, None], u[:, None], distance, shift)  # (P, n, N)
            attention = scores.exp2_()
            _store(grad_value[group][:, :, rows], product("result", attention, g, g.dtype))
            v_rows, g_columns = v[:, rows].to(u.dtype), g.to(u.dtype).transpose(1, 2)
            grad_logits = product("grad_logits", v_rows, g_columns, u.dtype, minus_delta).mul_(attention)
            _store(grad_key[group][:, :, rows], product("result", grad_logits, q, q.dtype).mul_(scale))
            part = product("part", grad_logits.transpose(1, 2), k[:, rows], u.dtype).mul_(scale)  # (P, N, d)
            grad_q = grad_q.copy_(part) if rows.start == 0 else grad_q.add_(part)
            weighted = grad_logits.mul_(distance)
            grad_u[:, rows] += weighted.sum(dim=-1)
            grad_u += weighted.sum(dim=-2)
        _store(grad_query[group], grad_q)
        _store(grad_half_decay[group], grad_u)
    return grad_query, grad_key, grad_value, grad_half_decay


@_forward.register_fake
def _(query, key, value, half_decay, *rest):
    return torch.empty_like(value), torch.empty_like(half_decay)


@_backward.register_fake
def _(grad_output, query, key, value, half_decay, *rest):
    return tuple(torch.empty_like(x) for x in (query, key, value, half_decay))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.height, ctx.width, ctx.clamp, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, grad_output, grad_log_sum):
    tensors = ctx.saved_tensors  # checkpointing lets them be unpacked once
    numbers = (ctx.height, ctx.width, ctx.clamp, ctx.scale)
    return *_backward(grad_output.to(tensors[2].dtype), *tensors, *numbers), *[None] * 5


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _rows(half_decay: torch.Tensor) -> Iterator[slice]:
    """Yield the tokens whose logits with all tokens are computed at a time."""
    tokens = half_decay.shape[-1]
    count = max(MIN_ROWS, _block_size(half_decay) // tokens)
    for first in range(0, tokens, count):
        yield slice(first, min(first + count, tokens))


def _groups(half_decay: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield samples and heads: several samples if their logits fit, otherwise some heads of one sample."""
    batch, heads, tokens = half_decay.shape
    pairs = max(1, _block_size(half_decay) // tokens**2)
    samples, heads_at_once = max(1, pairs // heads), min(pairs, heads)
    for first_sample in range(0, batch, samples):
        for first_head in range(0, heads, heads_at_once):
            yield slice(first_sample, first_sample + samples), slice(first_head, first_head + heads_at_once)


def _block_size(half_decay):
    return torch.get_num_threads() * BLOCK_BYTES // half_decay.element_size()


def _load(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return scratch.copy(name, tensor).flatten(0, 1)


def _store(place: torch.Tensor, result: torch.Tensor) -> None:
    place.copy_(result.view(place.shape))


def _distances_from(
    rows: slice, tokens: int, height: int, width: int, clamp: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Return the distances of some tokens from all, shape (n, N); 0 where one of the two is a register."""
    registers = tokens - height * width  # the first tokens
    if tokens <= MAX_CACHED_TOKENS:
        return _all_distances(registers, height, width, clamp, dtype)[rows]
    if registers:
        on_grid = slice(max(rows.start - registers, 0), max(rows.stop - registers, 0))
        distance = _distances_from(on_grid, height * width, height, width, clamp, dtype)
        above = rows.stop - rows.start - len(distance)
        return F.pad(distance, (registers, 0, above, 0))
    places = torch.arange(rows.start, rows.stop)
    along_y = (places[:, None] // width - torch.arange(height)).abs().to(dtype)  # (n, H)
    along_x = (places[:, None] % width - torch.arange(width)).abs().to(dtype)  # (n, W)
    place = scratch.empty("distance", len(places), height, width, dtype=dtype)
    distance = torch.add(along_y[:, :, None], along_x[:, None, :], out=place).flatten(1)
    return distance.clamp_(max=1) if clamp else distance


@functools.lru_cache(maxsize=8)
def _all_distances(registers, height, width, clamp, dtype):
    distance = manhattan_distance((height, width), dtype=dtype)  # (H*W, H*W)
    distance = distance.clamp_(max=1) if clamp else distance
    return F.pad(distance, (registers, 0) * 2) if registers else distance
