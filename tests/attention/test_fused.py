"""The Triton kernels, in Triton's interpreter on the CPU, and compiled for GPUs that are not there."""

import functools
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from sdt_diffusion.attention import Decay, spatial_decay_attention
from sdt_diffusion.attention.formula import reference_attention
from tests.scripts.process import ROOT

pytest.importorskip("triton", reason="triton comes with torch on Linux only")


def inputs(grid, batch=2, heads=2, head_dim=16, dtype=torch.float32, gate=None, seed=0):
    """Return query, key and value that are not contiguous, gate and alpha."""
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    shape = (batch, tokens, heads, head_dim)
    tensors = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]
    logits = torch.randn(batch, heads, tokens, generator=generator)
    gates = F.logsigmoid(logits) if gate is None else torch.full_like(logits, gate)
    return [x.requires_grad_() for x in (*tensors, gates, torch.rand(heads, generator=generator) + 0.5)]


def results(attend, tensors, grid, variant="context", dtype=None):
    """Return the output and all gradients, of a loss that weighs every number differently."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    *qkv, gate, alpha = tensors
    output = attend(*qkv, Decay(gate, alpha, grid, variant), 1 / qkv[0].shape[-1] ** 0.5)
    weights = torch.sin(torch.arange(output.numel())).view_as(output).to(output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors, allow_unused=True)]


def fused(*args, **options):
    from sdt_diffusion.attention.fused import fused_attention

    return fused_attention(*args, **options)


def error(found, expected):
    """Return the relative error of all numbers together."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("variant", ["context", "content"])
@pytest.mark.parametrize(
    ("grid", "head_dim"),
    [
        ((1, 1), 16),
        ((7, 7), 64),
        ((14, 14), 16),
        ((5, 13), 72),
        ((9, 2), 40),
        ((3, 5), 96),
        ((6, 6), 128),
        ((11, 1), 17),
    ],
)
def test_it_is_the_reference_with_all_gradients_on_any_grid_and_head(grid, head_dim, variant):
    tensors = inputs(grid, batch=1, head_dim=head_dim)
    expected = results(reference_attention, tensors, grid, variant, torch.float64)
    for found, wanted in zip(results(fused, tensors, grid, variant), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", [-1e-6, -1e-3, -30.0, -80.0])
def test_it_is_the_reference_for_gates_of_any_size(gate):
    tensors = inputs((6, 7), gate=gate)
    expected = results(reference_attention, tensors, (6, 7), dtype=torch.float64)
    for found, wanted in zip(results(fused, tensors, (6, 7)), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_without_decay_it_is_plain_attention():
    """At G = 0, where the gradient of the formula's absolute value is 0, the gate's gradient is that of M itself."""
    tensors = inputs((6, 7), gate=0.0)
    found = results(fused, tensors, (6, 7))
    expected = results(reference_attention, tensors, (6, 7), dtype=torch.float64)
    for mine, wanted in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)
    assert found[4].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_in_half_precision_it_errs_at_most_twice_as_much_as_plain_attention(dtype, head_dim):
    grid, tensors = (9, 10), inputs((9, 10), head_dim=head_dim, dtype=dtype)
    expected = results(reference_attention, tensors, grid, dtype=torch.float64)
    plain = results(reference_attention, tensors, grid)
    for found, other, wanted in zip(results(fused, tensors, grid), plain, expected, strict=True):
        assert error(found, wanted) <= 2 * error(other, wanted) + 1e-4


def test_it_gives_the_same_bits_twice():
    tensors = inputs((9, 10), dtype=torch.bfloat16)
    for first, second in zip(results(fused, tensors, (9, 10)), results(fused, tensors, (9, 10)), strict=True):
        assert torch.equal(first, second)


def test_memory_beyond_the_tokens_is_not_read():
    """Tails of blocks, other heads' columns and padding may hold anything."""
    grid, head_dim = (5, 7), 24
    tensors = inputs(grid, head_dim=head_dim)
    padded = []
    for tensor in tensors[:3]:
        memory = torch.full((2, 2, 35 + 3, head_dim + 8), torch.nan)
        memory[:, :, :35, :head_dim] = tensor.detach()
        padded.append(memory[:, :, :35, :head_dim].requires_grad_())
    found = fused(*padded, Decay(*tensors[3:], grid, "context"), 0.2)
    expected = fused(*(x.contiguous() for x in tensors[:3]), Decay(*tensors[3:], grid, "context"), 0.2)
    assert torch.equal(found, expected)
    weights = torch.ones_like(found)
    for mine, other in zip(
        torch.autograd.grad((found * weights).sum(), padded),
        torch.autograd.grad((expected * weights).sum(), tensors[:3]),
        strict=True,
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("variant", ["context", "content"])
def test_rows_and_columns_are_the_reference_on_each_of_them(variant):
    """The passes by strides are those over copies of the rows and columns, with all gradients."""
    grid, tensors = (5, 7), inputs((5, 7))
    expected = results(decomposed_reference, tensors, grid, variant, torch.float64)
    found = results(functools.partial(fused, decomposed=True), tensors, grid, variant)
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)


def decomposed_reference(query, key, value, decay, scale):
    return spatial_decay_attention(
        query,
        key,
        value,
        decay.gate,
        decay.alpha,
        decay.grid_size,
        variant=decay.variant,
        decomposed=True,
        scale=scale,
        backend="reference",
    )


def test_a_compiler_sees_one_operator_each_way():
    from torch._dynamo.testing import CompileCounter

    grid, tensors = (4, 4), inputs((4, 4))
    counter = CompileCounter()

    def attend(query, key, value, gate, alpha):
        return spatial_decay_attention(query, key, value, gate, alpha, grid, backend="triton")

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), attend(*tensors))
    assert counter.frame_count == 1


def test_operators_are_registered_as_torch_wants_them():
    from sdt_diffusion.attention.fused import _forward

    query, key, value, gate, _ = (x.detach() for x in inputs((4, 4)))
    tensors = [each.requires_grad_() for each in (query, key, value, gate.contiguous())]
    torch.library.opcheck(_forward, (*tensors, None, None, None, 4, [1, 0, 1], 0.25, False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 8}, "needs heads of 16 to 128 columns"),
        ({"head_dim": 256}, "needs heads of 16 to 128 columns"),
        ({"dtype": torch.float64}, "takes float32, bfloat16 and float16"),
    ],
)
def test_what_it_cannot_compute_is_refused_by_name(change, message):
    tensors = inputs((3, 3), **change)
    with pytest.raises(ValueError, match=f"The backend 'triton' {message}"):
        spatial_decay_attention(*tensors, (3, 3), backend="triton")


def test_without_a_gpu_it_is_refused_by_name(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="The backend 'triton' needs a GPU"):
        spatial_decay_attention(*inputs((3, 3)), (3, 3), backend="triton")


def test_no_kernel_spills_at_head_size_64(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-m", "tests.attention.offline"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == 9
    assert [each for each in found if each["spilled_bytes"]] == []
    assert all(each["registers"] <= 255 and each["shared_bytes"] <= 99 << 10 for each in found)
