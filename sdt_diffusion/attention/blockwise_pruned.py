"""The blockwise backend with pruning: each tile of queries is computed with the tiles of keys that it needs.

Tokens are taken in the order of `tile_order`, S = `TILE` of them in each of T tiles, for P pairs of sample and head.
For a tile of queries, pairs that need about as many tiles of keys are computed together. One that needs fewer gets the
empty tile T instead: its keys have u = -inf, so that their weights are zero. So have those that fill up the last tile.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .blocks_of_logits import LOG2_E, logits, product, scratch, weighted_mean
from .pruning import TILE, coordinates_of, tile_order

#: Bytes of logits that each thread computes at a time.
BLOCK_BYTES = 2**20
#: Coordinate of keys that fill up tiles. It must not be that of a query, as -inf times no distance is not a number.
FAR = -1.0


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half_decay: torch.Tensor,
    needed: torch.Tensor,
    grid_size: tuple[int, int],
    clamp: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, and log2 of the softmax's denominators, shape (batch, heads, tokens)."""
    tiles = _Tiles(grid_size, clamp, half_decay.dtype)
    q, k, v, u = (tiles.pack(x) for x in (query, key, value, half_decay * LOG2_E))  # (P, T+1, S, ...)
    u_of_keys = tiles.pack(half_decay * LOG2_E, fill=-math.inf)
    output, log_sum = torch.zeros_like(v), torch.zeros_like(u)
    for block in tiles.blocks(needed):
        rows = block.rows
        u_j = block.keys("u", u_of_keys)[:, None]
        scores = logits(q[rows], block.keys("k", k), scale, u[rows][..., None], u_j, block.distance)  # (p, S, m*S)
        output[rows], log_sum[rows] = weighted_mean(scores, block.keys("v", v))
    return tiles.unpack(output, value), tiles.unpack(log_sum, half_decay)


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half_decay: torch.Tensor,
    needed: torch.Tensor,
    log_sum: torch.Tensor,
    row_sum: torch.Tensor,
    grid_size: tuple[int, int],
    clamp: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients from recomputed attention, over the same tiles."""
    tiles = _Tiles(grid_size, clamp, half_decay.dtype)
    q, k, v, g = (tiles.pack(x) for x in (query, key, value, grad_output))  # (P, T+1, S, d)
    u, shift, delta = (tiles.pack(x) for x in (half_decay * LOG2_E, -log_sum, row_sum))  # (P, T+1, S)
    u_of_keys = tiles.pack(half_decay * LOG2_E, fill=-math.inf)
    grad_q, grad_k, grad_v, grad_u = (torch.zeros_like(x, dtype=u.dtype) for x in (q, k, v, u))
    for block in tiles.blocks(needed):
        rows, keys = block.rows, block.keys("k", k)  # (p, m*S, d)
        u_j = block.keys("u", u_of_keys)[:, None]
        scores = logits(q[rows], keys, scale, u[rows][..., None], u_j, block.distance)  # (p, S, m*S)
        attention = scores.add_(shift[rows][..., None]).exp2_()
        block.add_to_keys(grad_v, product("result", attention.transpose(1, 2), g[rows], u.dtype))
        g_rows, values = g[rows].to(u.dtype), block.keys("v", v).to(u.dtype)
        grad_logits = product("grad_logits", g_rows, values.transpose(1, 2), u.dtype)
        grad_logits.sub_(delta[rows][..., None]).mul_(attention)
        grad_q[rows] = product("grad_q", grad_logits, keys, u.dtype).mul_(scale)
        block.add_to_keys(grad_k, product("result", grad_logits.transpose(1, 2), q[rows], u.dtype).mul_(scale))
        weighted = grad_logits.mul_(block.distance)
        grad_u[rows] += weighted.sum(dim=-1)
        block.add_to_keys(grad_u, weighted.sum(dim=-2))
    grad_query, grad_key, grad_value = (tiles.unpack(*x) for x in ((grad_q, query), (grad_k, key), (grad_v, value)))
    return grad_query, grad_key, grad_value, tiles.unpack(grad_u, half_decay)


class _Block(NamedTuple):
    """A tile of queries of some pairs, and the tiles of keys that they need.

    Args:
        rows: Index of the queries in a packed tensor: the pairs, shape (p,), and the number of the tile.
        key_tiles: The tiles of keys, shape (p*m,), counted over all pairs.
        distance: Distances of queries and keys, shape (p, S, m*S).
    """

    rows: tuple[torch.Tensor, int]
    key_tiles: torch.Tensor
    distance: torch.Tensor

    def keys(self, name: str, packed: torch.Tensor) -> torch.Tensor:
        """Return the keys of a packed tensor, shape (p, m*S, ...); valid until the next of this name."""
        place = scratch.empty(name, len(self.key_tiles), *packed.shape[2:], dtype=packed.dtype)
        chosen = torch.index_select(packed.flatten(0, 1), 0, self.key_tiles, out=place)
        return chosen.view(len(self.distance), -1, *packed.shape[3:])

    def add_to_keys(self, packed: torch.Tensor, values: torch.Tensor) -> None:
        """Add to the keys of a packed tensor; only the empty tile is there twice."""
        packed.flatten(0, 1).index_add_(0, self.key_tiles, values.view(len(self.key_tiles), *packed.shape[2:]))


class _Tiles:
    """The tiles of a grid: how tensors lie in them, and in which blocks they are computed."""

    def __init__(self, grid_size: tuple[int, int], clamp: bool, dtype: torch.dtype):
        self.order, self.clamp = tile_order(grid_size), clamp
        self.count = -(-len(self.order) // TILE)
        y, x = coordinates_of(grid_size).to(dtype).T[:, None, None]  # (1, 1, N) each
        self.queries = self.pack(y)[0], self.pack(x)[0]  # (T+1, S) each
        self.keys = self.pack(y, fill=FAR)[0], self.pack(x, fill=FAR)[0]

    def pack(self, tensor: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Lay out (batch, heads, tokens, ...) as (P, T+1, S, ...), with a value where there is no token."""
        packed = tensor.new_full((*tensor.shape[:2], (self.count + 1) * TILE, *tensor.shape[3:]), fill)
        packed[:, :, : len(self.order)] = tensor.transpose(1, 2).index_select(1, self.order).transpose(1, 2)
        return packed.flatten(0, 1).unflatten(1, (self.count + 1, TILE))

    def unpack(self, packed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Lay out (P, T+1, S, ...) as `like`, which is (batch, heads, tokens, ...), in its dtype."""
        result = torch.empty_like(like)
        result[:, :, self.order] = packed.flatten(1, 2)[:, : len(self.order)].view(like.shape).to(like.dtype)
        return result

    def blocks(self, needed: torch.Tensor) -> Iterator[_Block]:
        """Yield what is computed at a time, for `needed` as `needed_tiles` returns it."""
        needed = needed.flatten(0, 1)  # (P, T, T)
        counts = needed.sum(dim=-1)  # (P, T)
        first_needed = needed.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)  # (P, T, T)
        lists = first_needed.masked_fill(torch.arange(self.count) >= counts[..., None], self.count)
        block_tiles = max(1, torch.get_num_threads() * BLOCK_BYTES // (TILE * TILE * self.keys[0].element_size()))
        for tile in range(self.count):
            distance = self._distances_from(tile)
            remaining = counts[:, tile].argsort(descending=True, stable=True)
            while len(remaining):
                most = int(counts[remaining[0], tile])
                pairs, remaining = remaining.split_with_sizes(
                    [n := min(len(remaining), max(torch.get_num_threads(), block_tiles // most)), len(remaining) - n]
                )
                chosen = lists[pairs, tile, :most]  # (p, m)
                place = scratch.empty("distance", TILE, chosen.numel(), TILE, dtype=distance.dtype)
                torch.index_select(distance, 1, chosen.flatten(), out=place)
                key_tiles = (pairs[:, None] * (self.count + 1) + chosen).flatten()
                yield _Block((pairs, tile), key_tiles, place.view(TILE, len(pairs), -1).transpose(0, 1))

    def _distances_from(self, tile: int) -> torch.Tensor:
        """Return the distances of a tile's queries from all keys, shape (S, T+1, S)."""
        along_y, along_x = (
            torch.sub(
                of_queries[tile][:, None, None],
                of_keys,
                out=scratch.empty(name, TILE, self.count + 1, TILE, dtype=of_keys.dtype),
            ).abs_()
            for name, of_queries, of_keys in zip(("along_y", "along_x"), self.queries, self.keys, strict=True)
        )
        distance = along_y.add_(along_x)
        return distance.clamp_(max=1) if self.clamp else distance
