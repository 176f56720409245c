"""Find the tiles of keys that attention can skip, because a bound shows how little they add to the softmax.

Decay makes attention local: beyond some distance no key can matter, whatever its content. Tokens are taken in tiles of
`TILE` tokens that lie close together on the grid. For a query i and a tile J of keys with the center c_J, the radius
r_J and the distance d_iJ of its nearest token,

    S_ij = q_i . k_j * scale + (u_i + u_j) d_ij  <=  (q_i . c_J + |q_i| r_J) * scale + (u_i + max_J u) d_iJ = S_iJ

holds for all j in J, as u = 1/2 alpha G <= 0. The logits of the query's own tile give a lower bound of its softmax's
denominator, L_i <= log Z_i. So the tile holds at most |J| exp(max_i (S_iJ - L_i)) of the softmax of any query i of a
tile. For each tile of queries, as many tiles of keys are skipped as together hold at most `eps`.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch

#: Tokens of a tile: a square of `SIDE` tokens a side, unless the grid's sides are no multiples of it.
TILE, SIDE = 64, 8
#: Bounds to compute at a time, in numbers.
SCRATCH = 2**24
#: Rounding errors of products, relative to the norms of query and key: those of bf16, which torch may be told to use.
SLACK = 8e-3


def coordinates_of(grid_size: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """Return row and column of each token in raster order, shape (tokens, 2)."""
    tokens = torch.arange(grid_size[0] * grid_size[1], device=device)
    return torch.stack([tokens // grid_size[1], tokens % grid_size[1]], dim=1)


def tile_order(grid_size: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """Return the tokens tile by tile, shape (tokens,); the last tile may have fewer than `TILE`."""
    height, width = grid_size
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    squares = y // SIDE * -(-width // SIDE) + x // SIDE  # (H, W)
    return (squares * TILE + y % SIDE * SIDE + x % SIDE).flatten().argsort()


# An operator, so that a compiler neither looks into it nor loses what `tile_densities` collects.
@torch.library.custom_op("sdt_diffusion::needed_tiles", mutates_args=())
def needed_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    half_decay: torch.Tensor,
    coordinates: torch.Tensor,
    order: torch.Tensor,
    scale: float,
    eps: float,
    clamp: bool = False,
) -> torch.Tensor:
    """Return which tiles of keys each tile of queries needs.

    Args:
        query: Shape (batch, heads, tokens, head_dim).
        key: Likewise.
        half_decay: u = 1/2 alpha G <= 0, shape (batch, heads, tokens).
        coordinates: Row and column of each token, shape (tokens, 2).
        order: The tokens, tile by tile, as `tile_order` returns them.
        scale: Factor of Q K^T.
        eps: Share of a query's softmax that may be skipped.
        clamp: Whether distances are at most 1, as in the variant `content`.

    Returns:
        Boolean tensor of shape (batch, heads, tiles, tiles), queries first; true on its diagonal.
    """
    batch, heads, tokens, _ = query.shape
    tiles = -(-tokens // TILE)
    at_once = max(1, SCRATCH // (tiles * TILE * (tiles + TILE)))
    in_parts = (tensor.flatten(0, 1).split(at_once) for tensor in (query, key, half_decay))
    parts = [_needed(q, k, u, coordinates, order, scale, eps, clamp) for q, k, u in zip(*in_parts, strict=True)]
    needed = torch.cat(parts).view(batch, heads, tiles, tiles)
    for densities in _recorders.get():
        densities.append(needed.float().mean())
    return needed


@needed_tiles.register_fake
def _(query, key, half_decay, coordinates, order, scale, eps, clamp=False):
    tiles = -(-query.shape[2] // TILE)
    return query.new_empty((*query.shape[:2], tiles, tiles), dtype=torch.bool)


def _needed(query, key, half_decay, coordinates, order, scale, eps, clamp):
    """Return the same for pairs of sample and head, P of them; T tiles of S tokens."""
    tokens = len(order)
    tiles = -(-tokens // TILE)
    places = torch.arange(tiles * TILE, device=query.device)
    order = order[places.clamp(max=tokens - 1)]  # the last token again where a tile lacks some
    valid = (places < tokens).view(tiles, TILE)
    q = query.index_select(1, order).float().mul_(scale / math.log(2)).unflatten(1, (tiles, TILE))  # (P, T, S, D)
    k = key.index_select(1, order).float().unflatten(1, (tiles, TILE))
    u = half_decay.index_select(1, order).float().div_(math.log(2)).unflatten(1, (tiles, TILE))  # (P, T, S)
    where = coordinates[order].float().unflatten(0, (tiles, TILE))  # (T, S, 2)

    center = k.mean(dim=2)  # (P, T, D)
    rounding = SLACK * k.norm(dim=-1).amax(dim=2)  # (P, T), to be multiplied by the norm of the query
    radius = (k - center[:, :, None]).norm(dim=-1).amax(dim=2) + rounding  # (P, T)
    low, high = where.amin(dim=1), where.amax(dim=1)  # (T, 2)
    points = where.flatten(0, 1)  # (T*S, 2)
    gap = ((low - points[:, None]).clamp(min=0) + (points[:, None] - high).clamp(min=0)).sum(dim=-1)  # (T*S, T)
    own_distance = (where[:, :, None] - where[:, None]).abs().sum(dim=-1)  # (T, S, S)
    if clamp:
        gap, own_distance = gap.clamp(max=1), own_distance.clamp(max=1)

    # In units of log 2, as exp2 is much faster than exp on some CPUs.
    own = (q @ k.transpose(-1, -2)).addcmul_(u[..., :, None] + u[..., None, :], own_distance)  # (P, T, S, S)
    own.masked_fill_(~valid[:, None, :], -math.inf)
    maximum = own.amax(dim=-1, keepdim=True)
    denominator = (own - maximum).exp2_().sum(dim=-1).log2_() + maximum.squeeze(-1)  # (P, T, S)
    denominator = (denominator - q.norm(dim=-1) * rounding[..., None]).flatten(1, 2)  # (P, T*S)
    q, u_i = q.flatten(1, 2), u.flatten(1, 2)
    bound = (u_i[..., None] + u.amax(dim=2)[:, None]).mul_(gap)  # (P, T*S, T)
    bound.baddbmm_(q, center.transpose(1, 2)).addcmul_(q.norm(dim=-1)[..., None], radius[:, None])
    bound -= denominator[..., None]
    share = bound.unflatten(1, (tiles, TILE)).amax(dim=2).exp2_() * valid.sum(dim=-1)  # (P, T, T): at most, of a query
    own_tile = torch.eye(tiles, dtype=torch.bool, device=query.device)
    smallest, tile = share.masked_fill(own_tile, math.inf).sort(dim=-1)
    skipped = torch.zeros_like(share, dtype=torch.bool).scatter(-1, tile, smallest.cumsum(dim=-1) <= eps)
    return ~skipped  # NaN is no bound, so that its tile is kept


_recorders: ContextVar[tuple[list[torch.Tensor], ...]] = ContextVar("recorders", default=())


@contextlib.contextmanager
def tile_densities() -> Iterator[list[torch.Tensor]]:
    """Collect the fraction of tiles that each pruned attention needs, as scalar tensors, in order of the calls."""
    densities: list[torch.Tensor] = []
    token = _recorders.set((*_recorders.get(), densities))
    try:
        yield densities
    finally:
        _recorders.reset(token)
