"""FlexAttention, of which CPUs have the forward pass only."""

import functools

import pytest
import torch
import torch.nn.functional as F

from sdt_diffusion.attention import flex, spatial_decay_attention

GRID = (5, 7)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 35, 2, 16, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    gate = F.logsigmoid(torch.randn(2, 2, 35, generator=generator))
    return [query, key, value, gate, torch.rand(2, generator=generator) + 0.5]


@pytest.fixture
def quickly_compiled(monkeypatch):
    """Let what compiles the kernel trace it only; generating code for it takes 13 seconds here."""
    torch.compiler.reset()
    flex._compiled_flex_attention.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    flex._compiled_flex_attention.cache_clear()


@pytest.mark.usefixtures("quickly_compiled")
def test_it_is_the_reference_and_compiles_itself():
    output = spatial_decay_attention(*inputs(), GRID, variant="content", backend="flex")
    expected = spatial_decay_attention(*inputs(), GRID, variant="content", backend="reference")
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quickly_compiled")
def test_registers_have_no_place_on_the_grid():
    outputs = [
        spatial_decay_attention(*inputs(), (3, 11), backend=name, num_registers=2) for name in ("flex", "reference")
    ]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_it_is_the_reference_in_the_one_graph_of_a_compiled_model():
    torch.compiler.reset()
    attend = torch.compile(
        lambda *tensors: spatial_decay_attention(*tensors, GRID, backend="flex"), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(attend(*inputs()), spatial_decay_attention(*inputs(), GRID), rtol=1e-5, atol=1e-5)


def test_what_it_cannot_compute_is_refused():
    query, key, value, gate, alpha = inputs()
    for tensors in (
        (query.clone().requires_grad_(), key, value, gate),
        (query, key, value, gate.clone().requires_grad_()),
    ):
        with pytest.raises(ValueError, match="'flex' has no backward pass on CPUs"):
            spatial_decay_attention(*tensors, alpha, GRID, backend="flex")
    with pytest.raises(ValueError, match=r"'flex' takes float32, bfloat16 and float16, not torch.float64"):
        spatial_decay_attention(query.double(), key.double(), value.double(), gate, alpha, GRID, backend="flex")
