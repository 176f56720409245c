"""Which tiles are skipped, how much of the softmax they held, and that the rest is computed as ever."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_diffusion.attention import blockwise
from sdt_diffusion.attention.blockwise import blockwise_attention
from sdt_diffusion.attention.formula import Decay, manhattan_distance
from sdt_diffusion.attention.pruning import (
    TILE,
    coordinates_of,
    needed_tiles,
    tile_densities,
    tile_order,
)

EPS = 1e-4


def inputs(grid, gate=-3.0, head_dim=8, heads=2, batch=1, dtype=torch.float64, seed=0):
    """Heads decay less and less, so that they need unequal numbers of tiles."""
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    query, key, value = (torch.randn(batch, heads, tokens, head_dim, generator=generator).to(dtype) for _ in range(3))
    gate = gate * (0.5 + torch.rand(batch, heads, tokens, generator=generator)) / torch.arange(1, heads + 1)[:, None]
    alpha = torch.rand(heads, generator=generator) + 0.5
    return [query, key, value, gate.to(dtype), alpha.to(dtype)]


def logits(query, key, gate, alpha, grid, scale, clamp=False):
    half_decay = (gate * alpha[:, None] / 2).double()
    distance = manhattan_distance(grid, dtype=torch.float64)
    distance = distance.clamp(max=1) if clamp else distance
    products = query.double() @ key.double().transpose(-1, -2) * scale
    return products + (half_decay[..., :, None] + half_decay[..., None, :]) * distance


def needed_tokens(needed, grid):
    """Spread (B, h, T, T) to all pairs of tokens, in raster order."""
    tile = torch.empty(grid[0] * grid[1], dtype=torch.long)
    tile[tile_order(grid)] = torch.arange(grid[0] * grid[1]) // TILE
    return needed[:, :, tile][..., tile]


def tiles_of(query, key, gate, alpha, grid, scale=0.3, eps=EPS, clamp=False):
    half_decay = gate * alpha[:, None] / 2
    return needed_tiles(query, key, half_decay, coordinates_of(grid), tile_order(grid), scale, eps, clamp)


def lost(query, key, gate, alpha, grid, scale=0.3, eps=EPS, clamp=False):
    """The largest share of a query's softmax that is skipped, in fp64, and the share of tiles that is not."""
    needed = tiles_of(query, key, gate, alpha, grid, scale, eps, clamp)
    weights = logits(query, key, gate, alpha, grid, scale, clamp).softmax(-1)
    return (weights * ~needed_tokens(needed, grid)).sum(-1).max().item(), needed.double().mean().item()


@pytest.mark.parametrize("grid", [(8, 8), (16, 24), (7, 9), (50, 33), (1, 100)])
def test_tiles_hold_every_token_once_and_those_of_whole_squares_first(grid):
    order = tile_order(grid)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))
    if not grid[0] % 8 and not grid[1] % 8:
        where = coordinates_of(grid)[order].unflatten(0, (-1, TILE))
        assert (where.amax(1) - where.amin(1)).tolist() == [[7, 7]] * len(where)


@given(
    grid=st.sampled_from([(16, 16), (17, 23), (24, 16), (9, 40)]),
    gate=st.sampled_from([-0.1, -1.0, -3.0, -8.0, -80.0]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    eps=st.sampled_from([1e-1, 1e-3, 1e-6]),
    clamp=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_no_query_loses_more_than_its_share(grid, gate, spread, eps, clamp, seed):
    query, key, _, gate, alpha = inputs(grid, gate, seed=seed, dtype=torch.float32)
    assert lost(query * spread, key * spread, gate, alpha, grid, eps=eps, clamp=clamp)[0] <= eps


def collinear(grid, length):
    """All keys in one direction, in which one query looks: bounds by norms are exact."""
    query, _, _, gate, alpha = inputs(grid, dtype=torch.float32)
    direction = torch.nn.functional.normalize(torch.ones(8), dim=0)
    tokens = grid[0] * grid[1]
    return (
        direction.expand_as(query) * length,
        direction * torch.linspace(-1, 1, tokens)[:, None] * length,
        gate,
        alpha,
    )


@pytest.mark.parametrize("length", [1.0, 3.0, 10.0, 100.0])
def test_bounds_hold_for_collinear_keys(length):
    query, key, gate, alpha = collinear((24, 24), length)
    share, _ = lost(query, key.expand_as(query), gate, alpha, (24, 24))
    assert share <= EPS


def test_a_far_key_that_matters_is_found():
    """A key at the other end whose product with one query makes up for all its decay."""
    query, key, _, gate, alpha = inputs((24, 24), dtype=torch.float32)
    key[:, :, -1] = query[:, :, 0] * 1000
    needed = needed_tokens(tiles_of(query, key, gate, alpha, (24, 24)), (24, 24))
    assert needed[..., 0, -1].all()
    assert lost(query, key, gate, alpha, (24, 24))[0] <= EPS


def test_where_nothing_decays_nothing_is_skipped():
    query, key, _, gate, alpha = inputs((24, 24), gate=0.0)
    assert tiles_of(query, key, gate, alpha, (24, 24)).all()


def test_where_all_but_the_nearest_decays_each_tile_needs_its_neighbors_at_most():
    query, key, _, gate, alpha = inputs((32, 32), gate=-80.0)
    needed = tiles_of(query, key, gate, alpha, (32, 32))
    tiles = coordinates_of((4, 4))
    near = (tiles[:, None] - tiles).abs().sum(-1) <= 1
    assert not (needed & ~near).any()
    assert needed.diagonal(dim1=-2, dim2=-1).all()


def test_values_that_are_not_finite_are_never_skipped():
    query, key, _, gate, alpha = inputs((16, 16), gate=-80.0)
    key[0, 0, 200, 3] = torch.nan
    needed = needed_tokens(tiles_of(query, key, gate, alpha, (16, 16)), (16, 16))
    assert needed[0, 0, :, 200].all()


def test_a_larger_share_skips_more():
    query, key, _, gate, alpha = inputs((32, 32), gate=-2.0)
    densities = [tiles_of(query, key, gate, alpha, (32, 32), eps=eps).double().mean() for eps in (1e-8, 1e-4, 0.1)]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > densities[2]


class TestBlockwise:
    @pytest.fixture(autouse=True)
    def short_grids(self, monkeypatch):
        monkeypatch.setattr(blockwise, "MIN_PRUNED_TOKENS", 0)

    @pytest.mark.parametrize(
        ("grid", "variant", "batch"),
        [((32, 32), "context", 1), ((33, 30), "context", 2), ((24, 40), "content", 1), ((5, 9), "fixed", 2)],
    )
    def test_it_computes_the_softmax_over_the_needed_tiles(self, monkeypatch, grid, variant, batch):
        """Forward and backward, with blocks of one and of several pairs."""
        clamp = variant == "content"  # its distances are at most 1
        tensors = [x.requires_grad_() for x in inputs(grid, -90.0 if clamp else -6.0, heads=3, batch=batch)]
        query, key, value, gate, alpha = tensors
        decay = Decay(gate, alpha, grid, variant, EPS)
        kept = needed_tokens(tiles_of(*(x.detach() for x in (query, key, gate, alpha)), grid, clamp=clamp), grid)
        assert kept.all() == (grid == (5, 9))  # which is one tile
        expected = logits(query, key, gate, alpha, grid, 0.3, clamp).masked_fill(~kept, -torch.inf).softmax(-1) @ value
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
        wanted = torch.autograd.grad((expected * weights).sum(), tensors)
        monkeypatch.setattr(blockwise, "MAX_DENSITY", 1.0)
        for block_bytes in (2**20, 0):
            monkeypatch.setattr(blockwise.blockwise_pruned, "BLOCK_BYTES", block_bytes)
            output = blockwise_attention(query, key, value, decay, 0.3)
            torch.testing.assert_close(output, expected)
            for mine, other in zip(torch.autograd.grad((output * weights).sum(), tensors), wanted, strict=True):
                torch.testing.assert_close(mine, other)

    def test_where_most_tiles_are_needed_all_are_computed(self):
        query, key, value, gate, alpha = inputs((16, 16), gate=-0.01)
        decay = Decay(gate, alpha, (16, 16))
        pruned = blockwise_attention(query, key, value, decay._replace(prune_eps=EPS), 0.3)
        assert torch.equal(pruned, blockwise_attention(query, key, value, decay, 0.3))

    def test_short_grids_are_computed_whole(self, monkeypatch):
        monkeypatch.setattr(blockwise, "MIN_PRUNED_TOKENS", 257)
        query, key, value, gate, alpha = inputs((16, 16), gate=-80.0)
        with tile_densities() as densities:
            blockwise_attention(query, key, value, Decay(gate, alpha, (16, 16), "context", EPS), 0.3)
        assert not densities

    def test_half_precision_is_as_near_as_without_pruning(self):
        query, key, value, gate, alpha = inputs((32, 32), gate=-6.0, dtype=torch.float32)
        decay = Decay(gate, alpha, (32, 32))
        expected = blockwise_attention(query, key, value, decay, 0.3)
        low = [x.bfloat16() for x in (query, key, value)]
        errors = [
            (blockwise_attention(*low, decay._replace(prune_eps=eps), 0.3).float() - expected).norm()
            for eps in (0.0, EPS)
        ]
        assert errors[1] <= 1.1 * errors[0]

    def test_a_compiler_sees_operators_and_the_density_is_collected(self):
        query, key, value, gate, alpha = inputs((32, 32), gate=-20.0, dtype=torch.float32)

        def attend(query, gate):
            return blockwise_attention(query, key, value, Decay(gate, alpha, (32, 32), "context", EPS), 0.3)

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        with tile_densities() as densities:
            expected = attend(query, gate)
            assert torch.equal(compiled(query, gate), expected)
        assert len(densities) == 2
        assert 0 < densities[0] == densities[1] < 0.6

    def test_it_gives_the_same_bits_twice(self):
        tensors = [x.requires_grad_() for x in inputs((32, 32), gate=-6.0, dtype=torch.float32)]
        results = []
        for _ in range(2):
            output = blockwise_attention(*tensors[:3], Decay(*tensors[3:], (32, 32), "context", EPS), 0.3)
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)
