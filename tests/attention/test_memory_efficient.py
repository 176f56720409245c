"""The backend `xformers`, with torch's attention in place of xformers' kernels."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from sdt_diffusion.attention import spatial_decay_attention
from sdt_diffusion.attention.memory_efficient import load_xformers

GRID = (3, 5)


@pytest.fixture(autouse=True)
def _fresh_probe():
    load_xformers.cache_clear()
    yield
    load_xformers.cache_clear()


def inputs():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 15, 8, generator=generator) for _ in range(3))
    gate = F.logsigmoid(torch.randn(2, 2, 15, generator=generator))
    return [x.requires_grad_() for x in (query, key, value, gate, torch.rand(2, generator=generator) + 0.5)]


def install(monkeypatch, attend):
    """Put a package xformers of one function where Python looks for it."""
    operators = types.ModuleType("xformers.ops")
    operators.memory_efficient_attention = attend
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)


def test_xformers_gets_its_layout_and_an_aligned_bias(monkeypatch):
    def attend(query, key, value, attn_bias=None, scale=None):
        assert attn_bias.stride(-2) % 8 == 0
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale).transpose(1, 2)

    install(monkeypatch, attend)
    for variant in ("context", "content"):
        results = []
        for backend in ("reference", "xformers"):
            tensors = inputs()
            output = spatial_decay_attention(*tensors, GRID, backend=backend, variant=variant)
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_kernels_that_do_not_run_are_refused_with_their_reason(monkeypatch):
    def attend(*_, **__):
        raise NotImplementedError("No operator found:\nmany lines")

    install(monkeypatch, attend)
    with pytest.raises(ValueError, match=r"'xformers' does not run on cpu in torch.float32: No operator found:$"):
        spatial_decay_attention(*inputs(), GRID, backend="xformers")
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ValueError, match=r"does not run on cpu in torch.float32: .*xformers"):
        spatial_decay_attention(*inputs(), GRID, backend="xformers")
