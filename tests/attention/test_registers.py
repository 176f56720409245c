"""Tokens that are not on the grid: nothing decays with distance to or from them."""

import pytest
import torch
import torch.nn.functional as F

from sdt_diffusion.attention import BACKENDS, SPATIAL_DECAY_VARIANTS, blockwise, spatial_decay, spatial_decay_attention
from sdt_diffusion.attention.dispatch import WITHOUT_REGISTERS, choose_backend

GRID, REGISTERS, TOKENS = (3, 4), 2, 14
#: flex has a test of its own; xformers runs nowhere here, and its mask is `Decay.bias()`, as the reference's.
TESTED = [name for name in BACKENDS if name not in (*WITHOUT_REGISTERS, "xformers", "flex")]


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(2, 2, TOKENS, 8, generator=generator) for _ in range(3)]
    gate = F.logsigmoid(torch.randn(2, 2, TOKENS, generator=generator))
    return [x.requires_grad_() for x in (*tensors, gate, torch.tensor([0.7, 1.3]))]


def attend(tensors, backend=None, variant="context", **options):
    return spatial_decay_attention(*tensors, GRID, variant=variant, backend=backend, num_registers=2, **options)


def formula(query, key, value, gate, alpha, variant):
    logits = query @ key.mT / 8**0.5
    if variant != "none":
        logits[..., 2:, 2:] += spatial_decay(gate[..., 2:], alpha, GRID, variant)
    return logits.softmax(-1) @ value


@pytest.mark.parametrize("variant", SPATIAL_DECAY_VARIANTS)
@pytest.mark.parametrize("backend", TESTED)
def test_backends_decay_on_the_grid_alone_forward_and_backward(backend, variant):
    if backend == "factored" and variant == "content":
        pytest.skip("factored does not compute content at all")
    results = []
    for function in (lambda *x: formula(*x, variant), lambda *x: attend(x, backend, variant)):
        tensors = inputs()
        output = function(*tensors)
        weights = torch.sin(torch.arange(output.numel())).view_as(output)
        gradients = torch.autograd.grad((output * weights).sum(), tensors, allow_unused=True, materialize_grads=True)
        results.append([output, *gradients])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grids_that_are_too_large_to_keep_their_distances(monkeypatch):
    expected = attend(inputs(), "blockwise")
    monkeypatch.setattr(blockwise, "MAX_CACHED_TOKENS", 0)
    for rows in (1, 5, 64):  # blocks of registers alone, of both, and of all
        monkeypatch.setattr(blockwise, "MIN_ROWS", rows)
        monkeypatch.setattr(blockwise, "BLOCK_BYTES", 1)
        torch.testing.assert_close(attend(inputs(), "blockwise"), expected)


def test_registers_that_nobody_looks_at_change_nothing():
    query, key, value, gate, alpha = inputs()
    key = torch.cat(
        [torch.full_like(key[:, :, :2], -1e4) * query[:, :, 2:].sum(2, keepdim=True).sign(), key[:, :, 2:]], 2
    )
    query = query.abs() * query[:, :, 2:].sum(2, keepdim=True).sign()  # every product with a register's key is -1e4
    output = attend([query, key, value, gate, alpha])[:, :, 2:]
    on_grid = [x[:, :, 2:] for x in (query, key, value, gate)]
    torch.testing.assert_close(output, spatial_decay_attention(*on_grid, alpha, GRID))


def test_what_takes_no_registers_is_refused_or_not_chosen():
    tensors = inputs()
    with pytest.raises(ValueError, match="'triton' takes no num_registers, here 2: use 'dense'"):
        attend(tensors, "triton")
    with pytest.raises(ValueError, match=r"num_registers 2.*decomposed=True"):
        attend(tensors, decomposed=True)
    with pytest.raises(ValueError, match=r"num_registers 2.*prune_eps=0\.1"):
        attend(tensors, "blockwise", prune_eps=0.1)
    with pytest.raises(ValueError, match="12 tokens after 3 registers, but query and key have 14"):
        spatial_decay_attention(*tensors, GRID, num_registers=3)
    query = torch.empty(1, 2, TOKENS, 16, device="meta")
    assert choose_backend(query, query, "cuda", num_registers=2) == "dense"
