"""The decay as further columns of query and key."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_diffusion.attention import Decay, spatial_decay_attention
from sdt_diffusion.attention.factored import add_decay_columns
from sdt_diffusion.attention.formula import manhattan_distance, reference_attention

GRIDS = [(1, 1), (1, 6), (7, 1), (5, 7), (8, 8)]


def inputs(grid, gate=None, dtype=torch.float64, batch=2, heads=2, head_dim=8):
    """Return query, key and value that are not contiguous, gates around `gate`, and alpha."""
    generator = torch.Generator().manual_seed(0)
    tokens = grid[0] * grid[1]
    query, key, value = (
        torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=dtype).transpose(1, 2) for _ in range(3)
    )
    logits = torch.randn(batch, heads, tokens, generator=generator, dtype=dtype)
    gates = F.logsigmoid(logits) if gate is None else gate * (0.5 + logits.sigmoid())
    return [query, key, value, gates, torch.rand(heads, generator=generator, dtype=dtype) + 0.5]


def results(attend, tensors):
    """Return the output and all gradients, of a loss that weighs every number differently."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    output = attend(*tensors)
    weights = torch.sin(torch.arange(output.numel())).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


def attention(backend, grid, **options):
    return lambda *tensors: spatial_decay_attention(*tensors, grid, backend=backend, **options)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("variant", ["context", "fixed"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("gate", [None, -1e-6, -80.0])
def test_it_is_the_reference_with_all_gradients(grid, variant, decomposed, gate):
    options = {"variant": variant, "decomposed": decomposed}
    tensors = inputs(grid, gate)
    expected = results(attention("reference", grid, **options), tensors)
    for found, wanted in zip(results(attention("factored", grid, **options), tensors), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_one_gate_for_all_tokens_broadcasts():
    query, key, value, gate, alpha = inputs((3, 4))
    tensors = (query, key, value, gate[:1, :, :1], alpha)
    expected = results(attention("reference", (3, 4), variant="fixed"), tensors)
    for found, wanted in zip(results(attention("factored", (3, 4), variant="fixed"), tensors), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_without_decay_the_gate_has_the_gradient_of_m_and_not_of_its_absolute_value():
    """At G = 0 the absolute value of the formula has gradient 0; training never gets there."""
    *qkv, gate, alpha = inputs((3, 4))
    tensors = [*qkv, torch.zeros_like(gate), alpha]
    *expected, gradient, _ = results(attention("dense", (3, 4)), tensors)
    *found, found_gradient, _ = results(attention("factored", (3, 4)), tensors)
    for each, wanted in zip([*found, found_gradient], [*expected, gradient], strict=True):
        torch.testing.assert_close(each, wanted)
    assert gradient.abs().min() > 0
    assert not results(attention("reference", (3, 4)), tensors)[-2].any()


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=25)
def test_the_columns_hold_the_decay_of_rounded_gates_exactly(height, width, dtype, narrow, seed):
    """With all queries and keys zero, products of the columns are M to the last bit, in half precision.

    The narrow columns halve the gate, which rounds below fp16's normal range: a quarter of it is to stay above.
    """
    grid = (height, width)
    generator = torch.Generator().manual_seed(seed)
    smallest = 4 * torch.finfo(torch.float16).tiny
    gate = -torch.empty(1, 1, height * width).uniform_(smallest, 1, generator=generator)
    nothing = torch.zeros(1, 1, height * width, 8, dtype=dtype)
    needed = 8 + 2 * (height + width - 1)
    columns = add_decay_columns(
        nothing, nothing, nothing, Decay(gate, torch.ones(1), grid), 1.0, needed + 7 if narrow else None
    )
    query, key, value = (x.double() for x in columns)
    assert query.shape == key.shape == value.shape
    assert query.shape[-1] % 8 == 0
    half_decay = (gate / 2).to(dtype).double()
    expected = (half_decay[..., :, None] + half_decay[..., None, :]) * manhattan_distance(grid, dtype=torch.float64)
    assert torch.equal(query @ key.transpose(-1, -2), expected)


def errors(dtype, grid, gate):
    """Return the relative errors of output and gradients: with the decay, and of plain attention without."""
    qkv, gates = inputs(grid, gate or -1.0, torch.float32, batch=1, head_dim=64)[:3], inputs(grid, gate or -1.0)[3]
    qkv = [x.to(dtype) for x in qkv]
    gates = gates[:1].float()

    def relative(found, exact):
        return [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]

    def attend(backend):
        return lambda q, k, v, g: spatial_decay_attention(
            q, k, v, g, torch.ones(2, dtype=g.dtype), grid, backend=backend
        )

    exact = [x.double() for x in qkv]
    with_decay = relative(
        results(attend("factored"), [*qkv, gates]), results(attend("reference"), [*exact, gates.double()])
    )
    sdpa = F.scaled_dot_product_attention
    plain = relative(results(sdpa, qkv), results(lambda q, k, v: reference_attention(q, k, v, None, 1 / 8), exact))
    return with_decay, plain


CASES = [
    (dtype, grid, gate)
    for dtype in (torch.bfloat16, torch.float16)
    for grid in ((8, 8), (16, 16))
    for gate in (-0.001, -0.03, -0.7)
]


@pytest.mark.parametrize(("dtype", "grid", "gate"), [*CASES, (torch.float32, (32, 32), -0.001)])
def test_it_errs_at_most_twice_as_much_as_attention_without_decay(dtype, grid, gate):
    (output, *tokens, gates), (plain, *plain_gradients) = errors(dtype, grid, gate)
    assert output < 2 * plain
    for found, expected in zip(tokens, plain_gradients, strict=True):
        assert found < 2 * expected
    assert gates < 2 * max(plain_gradients)


def test_too_strong_a_decay_for_fp16_is_no_decay_of_nan():
    query, key, value, gate, alpha = inputs((3, 4), -80.0)
    output = spatial_decay_attention(
        query.half(), key.half(), value.half(), gate, alpha * 1e5, (3, 4), backend="factored"
    )
    assert torch.equal(output, value.half())


def test_what_has_no_factors_or_is_too_wide_is_refused():
    query, key, value, gate, alpha = inputs((5, 7))
    with pytest.raises(ValueError, match="'factored' computes the variants 'context' and 'fixed', not 'content'"):
        spatial_decay_attention(query, key, value, gate, alpha, (5, 7), variant="content", backend="factored")

    def widths(dtype, max_width, gate):
        decay = Decay(gate, alpha.float(), (5, 7))
        return {
            x.shape[-1] for x in add_decay_columns(*(x.to(dtype) for x in (query, key, value)), decay, 0.5, max_width)
        }

    gate = gate.float()
    trained = gate.clone().requires_grad_()
    assert widths(torch.bfloat16, 48, trained) == {48}
    assert widths(torch.bfloat16, 47, gate) == {32}
    refusal = r"heads of 48 columns on a grid of 5x7 \(32 in half precision without the gate's gradient\).*takes 47"
    with pytest.raises(ValueError, match=refusal):
        widths(torch.bfloat16, 47, trained)
    with torch.no_grad():
        assert widths(torch.bfloat16, 47, trained) == {32}
    with pytest.raises(ValueError, match=refusal):
        widths(torch.float32, 47, gate)
    with pytest.raises(ValueError, match="takes 31"):
        widths(torch.bfloat16, 31, gate)
