import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdt_diffusion.attention import SPATIAL_DECAY_VARIANTS, Decay, check_variant, spatial_decay

VARIANTS = [variant for variant in SPATIAL_DECAY_VARIANTS if variant != "none"]
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))
variants = st.sampled_from(VARIANTS)


def gate_and_alpha(grid, seed, batch=2, heads=3):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, heads, grid[0] * grid[1], generator=generator, dtype=torch.float64)
    alpha = torch.rand(heads, generator=generator, dtype=torch.float64) + 0.1
    return torch.nn.functional.logsigmoid(logits), alpha


@given(grids, variants, st.integers(0, 99))
def test_decay_is_never_positive_symmetric_and_zero_on_the_diagonal(grid, variant, seed):
    decay = spatial_decay(*gate_and_alpha(grid, seed), grid, variant)
    assert (decay <= 0).all()
    assert torch.equal(decay, decay.transpose(-1, -2))
    assert (decay.diagonal(dim1=-2, dim2=-1) == 0).all()


@given(grids, st.sampled_from(["context", "fixed", "content"]), st.integers(0, 99))
def test_flipping_or_transposing_the_grid_permutes_the_decay(grid, variant, seed):
    gate, alpha = gate_and_alpha(grid, seed)
    decay = spatial_decay(gate, alpha, grid, variant)
    index = torch.arange(grid[0] * grid[1]).view(grid)
    for moved in (index.flip(0), index.flip(1), index.T):
        order = moved.flatten()
        of_moved = spatial_decay(gate[..., order], alpha, tuple(moved.shape), variant)
        torch.testing.assert_close(of_moved, decay[..., order, :][..., order], rtol=0, atol=1e-12)


@given(grids, st.integers(0, 99))
def test_context_equals_the_formula_written_as_loops(grid, seed):
    gate, alpha = gate_and_alpha(grid, seed, batch=1, heads=1)
    decay = spatial_decay(gate, alpha, grid)[0, 0]
    width = grid[1]
    for i in range(len(decay)):
        for j in range(len(decay)):
            distance = abs(i // width - j // width) + abs(i % width - j % width)
            expected = -abs(0.5 * (gate[0, 0, i] + gate[0, 0, j]) * distance * alpha[0])
            torch.testing.assert_close(decay[i, j], expected)


@given(grids, st.integers(0, 99))
def test_raster_sums_the_gates_between_two_tokens(grid, seed):
    gate, alpha = gate_and_alpha(grid, seed, batch=1, heads=1)
    decay = spatial_decay(gate, alpha, grid, "raster")[0, 0]
    for i in range(len(decay)):
        for j in range(i):
            torch.testing.assert_close(decay[i, j], gate[0, 0, j + 1 : i + 1].sum() * alpha[0])


def test_content_ignores_the_distance():
    gate, alpha = gate_and_alpha((3, 4), 0)
    decay = spatial_decay(gate, alpha, (3, 4), "content")
    pair = (gate[..., :, None] + gate[..., None, :]) / 2 * alpha[:, None, None]
    off_diagonal = ~torch.eye(12, dtype=torch.bool)
    torch.testing.assert_close(decay[..., off_diagonal], pair[..., off_diagonal])


def test_constant_gates_give_rmts_decay():
    exponents = torch.tensor([2.0, 3.5], dtype=torch.float64)
    rmt = torch.log(1 - 2**-exponents)
    gate = rmt[None, :, None].expand(1, 2, 12)
    index = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"), -1).reshape(12, 2)
    mask = (index[:, None] - index[None]).abs().sum(-1) * rmt[:, None, None]
    torch.testing.assert_close(spatial_decay(gate, torch.ones(2).double(), (3, 4), "fixed")[0], mask)


@given(grids, st.sampled_from(["context", "fixed", "content"]), st.integers(0, 99))
def test_half_decay_and_distance_multiply_to_the_decay(grid, variant, seed):
    decay = Decay(*gate_and_alpha(grid, seed), grid, variant)
    half_decay, distance = decay.half_decay_and_distance()
    product = (half_decay[..., :, None] + half_decay[..., None, :]) * distance
    torch.testing.assert_close(product, decay.bias())
    torch.testing.assert_close(product, spatial_decay(*decay[:4]))


def test_raster_has_no_distance_to_factor_out():
    decay = Decay(*gate_and_alpha((2, 3), 0), (2, 3), "raster")
    assert decay.bias().shape == (2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"'raster' has no distance to factor out: use `bias\(\)`"):
        decay.half_decay_and_distance()


def test_decays_cannot_be_changed():
    decay = Decay(*gate_and_alpha((2, 3), 0), (2, 3))
    with pytest.raises(AttributeError):
        decay.variant = "raster"


def test_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'kontext'.*context, fixed, content, raster, none"):
        check_variant("kontext")
