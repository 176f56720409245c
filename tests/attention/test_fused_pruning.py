"""The Triton kernels with pruning, in Triton's interpreter on the CPU. All memory that is not filled holds NaN."""

import functools

import pytest
import torch

from sdt_diffusion.attention import Decay
from sdt_diffusion.attention import fused as fused_module
from sdt_diffusion.attention.formula import reference_attention
from sdt_diffusion.attention.pruning import TILE, needed_tiles, tile_order
from tests.attention.cases import fused, inputs, pruned, results

pytest.importorskip("triton", reason="triton comes with torch on Linux only")
pytestmark = [
    pytest.mark.usefixtures("strict_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # of the interpreter: infinities are meant
]


def without_skipped_tiles(needed, query, key, value, decay, scale):
    """Compute the reference with logits of -inf in all tiles that are not needed."""
    order = tile_order(decay.grid_size, query.device)
    tile = torch.empty_like(order)
    tile[order] = torch.arange(len(order)) // TILE
    logits = query @ key.transpose(-1, -2) * scale + decay.bias()
    return logits.masked_fill(~needed[:, :, tile][..., tile], -torch.inf).softmax(-1) @ value


def tiles_of(tensors, grid, variant, eps):
    """Return the needed tiles of tensors that `results` gets."""
    query, key, _, gate, alpha = (x.detach() for x in tensors)
    coordinates = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    decays = gate * alpha[:, None] / 2
    scale = query.shape[-1] ** -0.5
    return needed_tiles(
        query, key, decays, coordinates, tile_order(grid, query.device), scale, eps, variant == "content"
    )


@pytest.mark.parametrize(
    ("grid", "head_dim", "variant", "gate", "skips"),
    [
        ((7, 28), 16, "context", -4.0, True),
        ((9, 16), 72, "context", -0.1, False),
        ((14, 14), 24, "content", -80.0, True),
        ((3, 67), 16, "fixed", -80.0, True),
        ((7, 9), 16, "context", -1.0, False),
    ],
)
def test_it_is_the_reference_without_the_skipped_tiles_in_both_passes(grid, head_dim, variant, gate, skips):
    tensors = inputs(grid, batch=1, heads=1, head_dim=head_dim, gate=gate)
    needed = tiles_of(tensors, grid, variant, 1e-3)
    assert needed.all() != skips
    expected = results(functools.partial(without_skipped_tiles, needed), tensors, grid, variant, torch.float64)
    for mine, wanted in zip(results(pruned(1e-3), tensors, grid, variant), expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)


def test_each_head_skips_its_own_tiles_whichever_they_are(monkeypatch):
    grid, tensors = (7, 21), inputs((7, 21), batch=2, gate=-0.1)
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    needed = torch.rand(2, 2, 3, 3, generator=generator) < 0.4
    needed |= torch.eye(3, dtype=torch.bool)
    assert not torch.equal(needed, needed.transpose(-1, -2))
    monkeypatch.setattr(fused_module, "needed_tiles", lambda *args: needed)
    expected = results(functools.partial(without_skipped_tiles, needed), tensors, grid, dtype=torch.float64)
    for mine, wanted in zip(results(pruned(1e-3), tensors, grid), expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)


def adversary(name, grid=(8, 24)):
    """Return inputs that a careless bound would prune wrongly."""
    query, key, value, gate, alpha = (x.detach() for x in inputs(grid, batch=1, heads=1, gate=-1.0))
    if name == "collinear":
        query, key = query[..., :1, :] * torch.rand_like(query[..., :1]), query[..., :1, :] * torch.rand_like(query)
    if name == "huge keys far away":
        key[..., grid[1] - 1 :: grid[1], :] *= 30  # the last column
    if name == "one free token":
        gate, query, key = gate * 80, query / 100, key / 100
        gate[..., 0] = 0
    if name == "opposite":
        key = -query * 3  # the diagonal is the smallest logit
    return [query, key, value, gate, alpha]


@pytest.mark.parametrize("name", ["collinear", "huge keys far away", "one free token", "opposite"])
@pytest.mark.parametrize("eps", [1e-2, 1e-6])
def test_at_most_eps_of_any_softmax_is_skipped(name, eps):
    grid, tensors = (8, 24), adversary(name)
    query, key, value, gate, alpha = (x.double() for x in tensors)
    attention = reference_attention(query, key, torch.eye(192).double(), Decay(gate, alpha, grid), 0.25)
    needed = tiles_of(tensors, grid, "context", eps)
    tile = torch.arange(192) % grid[1] // 8  # 8 x 8 tokens each
    lost = (attention * ~needed[:, :, tile][..., tile]).sum(-1)
    assert lost.max() <= eps
    found = pruned(eps)(*tensors[:3], Decay(*tensors[3:], grid), 0.25)
    bound = 2 * lost[..., None] * value.abs().max() + 1e-4
    assert ((found - attention @ value).abs() <= bound).all()


def test_it_gives_the_same_bits_twice():
    tensors = inputs((3, 67), batch=1, heads=1, gate=-80.0)
    for mine, again in zip(*(results(pruned(1e-3), tensors, (3, 67)) for _ in range(2)), strict=True):
        assert torch.equal(mine, again)


def test_skipped_tiles_and_the_ends_of_lists_are_not_read(monkeypatch):
    grid, tensors = (3, 67), inputs((3, 67), batch=1, heads=1, gate=-80.0)
    needed = tiles_of(tensors, grid, "context", 1e-3)
    needs_itself_only = torch.tensor([False, False, False, True])
    assert torch.equal(needed[0, 0, -1], needs_itself_only)
    assert torch.equal(needed[0, 0, :, -1], needs_itself_only)
    expected = results(pruned(1e-3), tensors, grid)

    def lists(needed):
        """Continue lists with tiles that do not exist."""
        found = original(needed)
        return found.masked_fill_(torch.arange(-1, found.shape[-1] - 1) >= found[..., :1], 2**30)

    original = fused_module._lists
    monkeypatch.setattr(fused_module, "_lists", lists)
    monkeypatch.setattr(fused_module, "needed_tiles", lambda *args: needed)
    others, last = tile_order(grid, needed.device).split([3 * TILE, 9])
    poisoned = [x.detach().index_fill(2, others, torch.nan) for x in tensors[:3]]
    found = results(pruned(1e-3), [*poisoned, *tensors[3:]], grid)
    for mine, wanted in zip(found[:5], expected[:5], strict=True):  # alpha's gradient is a sum over all tokens
        assert torch.equal(mine[:, :, last], wanted[:, :, last])


def test_with_weak_gates_it_changes_rounding_only():
    grid, tensors = (9, 16), inputs((9, 16), batch=1, heads=1, gate=-1e-3)
    for mine, other in zip(results(pruned(1e-2), tensors, grid), results(fused, tensors, grid), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
