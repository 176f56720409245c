import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from sdt_diffusion.attention import (
    BACKENDS,
    SPATIAL_DECAY_VARIANTS,
    dispatch,
    spatial_decay,
    spatial_decay_attention,
)

GRID = (3, 4)
#: Backends that compute fp64, any head and any variant on CPUs; the others have tests of their own.
ON_CPU = [name for name in BACKENDS if name not in ("triton", "factored", "flex", "xformers")]
#: Those of which every variant but `content` and `raster` must be as good.
FAST_ON_CPU = [*(name for name in ON_CPU if name != "reference"), "factored"]
decaying = pytest.mark.parametrize("variant", [v for v in SPATIAL_DECAY_VARIANTS if v != "none"])
all_variants = pytest.mark.parametrize("variant", list(SPATIAL_DECAY_VARIANTS))
both_forms = pytest.mark.parametrize("decomposed", [False, True])


def inputs(grid=GRID, batch=2, heads=2, head_dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    query, key, value = (
        torch.randn(batch, heads, tokens, head_dim, generator=generator, dtype=dtype) for _ in range(3)
    )
    gate = F.logsigmoid(torch.randn(batch, heads, tokens, generator=generator, dtype=dtype))
    alpha = torch.rand(heads, generator=generator, dtype=dtype) + 0.5
    return [x.requires_grad_() for x in (query, key, value, gate.detach(), alpha)]


def test_few_tokens_in_bf16_are_computed_in_fp32_on_cpus():
    query, key, value = half = [x.detach().bfloat16().requires_grad_() for x in inputs()[:3]]
    full = [x.detach().float().requires_grad_() for x in half]
    with torch.autocast("cpu", torch.bfloat16):
        output = spatial_decay_attention(query, key, value, None, None, GRID, variant="none")
    expected = F.scaled_dot_product_attention(*full)
    assert torch.equal(output, expected.bfloat16())
    gradients, exact = torch.autograd.grad(output.float().sum(), half), torch.autograd.grad(expected.sum(), full)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(gradients, exact, strict=True))


def dense(query, key, value, decay):
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (logits + decay).softmax(-1) @ value


def two_passes(query, key, value, gate, alpha, grid):
    """The decomposed form as two dense attentions over all tokens, masked to the row, then to the column."""
    height, width = grid
    tokens = torch.arange(height * width)
    y, x = tokens // width, tokens % width
    pair = (gate[..., :, None] + gate[..., None, :]) / 2 * alpha[:, None, None]
    for distance, same in (
        ((x[:, None] - x).abs(), y[:, None] == y),
        ((y[:, None] - y).abs(), x[:, None] == x),
    ):
        decay = -(pair * distance).abs()
        value = dense(query, key, value, decay.masked_fill(~same, -torch.inf))
    return value


@decaying
def test_equals_a_dense_softmax_with_the_decay_added(variant):
    query, key, value, gate, alpha = inputs()
    output = spatial_decay_attention(query, key, value, gate, alpha, GRID, variant=variant)
    expected = dense(query, key, value, spatial_decay(gate, alpha, GRID, variant))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_is_plain_attention_in_one_and_in_two_passes(backend):
    query, key, value, _, _ = inputs()
    no_decay = (torch.zeros(2, 2, 12).double(), torch.ones(2).double())
    for decomposed, expected in (
        (False, F.scaled_dot_product_attention(query, key, value)),
        (False, dense(query, key, value, 0)),
        (True, two_passes(query, key, value, *no_decay, GRID)),
    ):
        output = spatial_decay_attention(
            query, key, value, None, None, GRID, variant="none", decomposed=decomposed, backend=backend
        )
        torch.testing.assert_close(output, expected)


@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(0, 99))
def test_decomposed_equals_two_dense_passes(grid, seed):
    query, key, value, gate, alpha = inputs(grid, seed=seed)
    output = spatial_decay_attention(query, key, value, gate, alpha, grid, decomposed=True)
    torch.testing.assert_close(output, two_passes(query, key, value, gate, alpha, grid))


@both_forms
def test_one_row_and_one_column_need_no_decomposition(decomposed):
    for grid in ((1, 6), (6, 1)):
        tensors = inputs(grid)
        full = spatial_decay_attention(*tensors, grid)
        # The other pass sees one token a line and leaves the values as they are.
        torch.testing.assert_close(spatial_decay_attention(*tensors, grid, decomposed=decomposed), full)


@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
@both_forms
@decaying
def test_backends_equal_the_reference_forward_and_backward(backend, decomposed, variant):
    results = []
    for name in ("reference", backend):
        tensors = inputs()
        output = spatial_decay_attention(*tensors, GRID, variant=variant, decomposed=decomposed, backend=name)
        output.square().sum().backward()
        results.append([output, *(x.grad for x in tensors)])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


def gradients(tensors, grid, **options):
    """Return the output and all gradients, of a loss that weighs every number differently."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    output = spatial_decay_attention(*tensors, grid, **options)
    weights = torch.sin(torch.arange(output.numel())).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


@pytest.mark.parametrize("backend", FAST_ON_CPU)
@given(st.tuples(st.integers(1, 7), st.integers(1, 7)), st.sampled_from([1e-6, 1, 80]), st.booleans(), st.booleans())
@settings(max_examples=30)
def test_backends_equal_the_reference_on_any_grid_with_gates_of_any_size(
    backend, grid, strength, decomposed, one_gate
):
    *qkv, gate, alpha = inputs(grid, batch=2)
    qkv = [x.mT.contiguous().mT for x in qkv]  # of other strides
    tensors = [*qkv, strength * (gate[:1, :, :1] if one_gate else gate.mT.contiguous().mT), alpha]
    expected = gradients(tensors, grid, decomposed=decomposed, backend="reference")
    for found, wanted in zip(gradients(tensors, grid, decomposed=decomposed, backend=backend), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", FAST_ON_CPU)
def test_backends_compile_to_one_graph_under_autocast_and_checkpointing(backend):
    def attend(*tensors):
        def block(*tensors):
            projected = [F.linear(x, torch.eye(4)) for x in tensors[:3]]  # in autocast's dtype
            return spatial_decay_attention(*projected, *tensors[3:], GRID, backend=backend)

        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(block, *tensors, use_reentrant=False)

    tensors = inputs(dtype=torch.float32)
    torch.compiler.reset()
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        output = function(*tensors)
        assert output.dtype == torch.bfloat16
        results.append([output, *torch.autograd.grad(output.float().square().sum(), tensors)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def masked_attention(query, key, value, decay, scale):
    """A backend as somebody may add it: torch's fused attention with the decay as its mask."""
    dtype = decay.gate.dtype
    query, key, tokens = (x.to(dtype) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, tokens, decay.bias(), scale=scale).to(value.dtype)


def test_a_new_backend_is_one_function_and_one_line_in_the_table(monkeypatch):
    monkeypatch.setitem(BACKENDS, "masked", masked_attention)
    test_none_is_plain_attention_in_one_and_in_two_passes("masked")
    test_half_precision_keeps_the_decay_in_fp32("masked")
    for variant in ("context", "fixed", "content", "raster"):
        for decomposed in (False, True):
            test_backends_equal_the_reference_forward_and_backward("masked", decomposed, variant)


def test_only_the_reference_computes_raster_and_no_decay(monkeypatch):
    def attend(*_):
        raise AssertionError("This backend must not be called.")

    monkeypatch.setitem(BACKENDS, "dense", attend)
    for variant in ("raster", "none"):
        spatial_decay_attention(*inputs(), GRID, variant=variant, backend="dense")


@pytest.mark.parametrize("variant", ["context", "raster"])
def test_functions_as_backends_receive_the_decay_of_each_pass(variant):
    decays = []

    def attend(query, key, value, decay, scale):
        assert scale == 0.5
        decays.append(decay)
        return BACKENDS["reference"](query, key, value, decay, scale)

    tensors = inputs()
    for decomposed in (False, True):
        output = spatial_decay_attention(*tensors, GRID, variant=variant, decomposed=decomposed, backend=attend)
        torch.testing.assert_close(
            output, spatial_decay_attention(*tensors, GRID, variant=variant, decomposed=decomposed)
        )
    assert [decay.grid_size for decay in decays] == [GRID, (1, 4), (3, 1)]
    assert [decay.gate.shape for decay in decays] == [(2, 2, 12), (6, 2, 4), (8, 2, 3)]
    assert {decay.variant for decay in decays} == {variant}
    spatial_decay_attention(*tensors, GRID, variant="none", backend=lambda *args: decays.append(args[3]))
    assert decays[-1] is None


def test_the_table_chooses_by_device_dtype_head_tokens_and_gradients(monkeypatch):
    def choose(device, head_dim=64, dtype=torch.bfloat16, tokens=256, value_dim=None):
        query = torch.empty(1, 1, tokens, head_dim, dtype=dtype, device="meta")
        return dispatch.choose_backend(query, query[..., :value_dim], device)

    assert choose("cpu") == "blockwise"
    assert choose("meta") == choose("mps") == "dense"
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    assert choose("cuda") == choose("cuda", dtype=torch.float32) == choose("cuda", head_dim=72) == "triton"
    assert choose("cuda", dtype=torch.float64) == choose("cuda", head_dim=8) == choose("cuda", head_dim=256) == "dense"
    assert choose("cuda", value_dim=32) == "dense"
    rows = (
        dispatch.Choice(("factored",), device="cuda", min_tokens=1024, training=False),
        dispatch.Choice(("dense",), device="cuda", training=True),
        dispatch.Choice(("triton",), device="cuda"),
    )
    monkeypatch.setattr(dispatch, "CHOICES", rows)
    assert choose("cuda", tokens=1024) == "dense"
    with torch.no_grad():
        assert (choose("cuda", tokens=1024), choose("cuda", tokens=1023)) == ("factored", "triton")
        assert choose("cpu") == choose("cuda", head_dim=8) == "reference"  # which computes anything


def called_backend(monkeypatch, **options):
    """Return which backend attends."""
    called = []

    def spy(name, attend):
        return lambda *args, **kwargs: called.append(name) or attend(*args, **kwargs)

    monkeypatch.setattr(dispatch, "BACKENDS", {name: spy(name, attend) for name, attend in BACKENDS.items()})
    spatial_decay_attention(*inputs(), GRID, **options)
    return called[0]


def test_the_environment_names_a_backend_where_no_argument_does(monkeypatch):
    monkeypatch.setenv("SDT_ATTENTION_BACKEND", "factored")
    assert called_backend(monkeypatch) == "factored"
    assert called_backend(monkeypatch, backend="dense") == "dense"
    monkeypatch.setenv("SDT_ATTENTION_BACKEND", "")
    assert called_backend(monkeypatch) == "blockwise"
    monkeypatch.setenv("SDT_ATTENTION_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"SDT_ATTENTION_BACKEND must be one of reference, dense.*, not 'cuda'"):
        spatial_decay_attention(*inputs(), GRID)


def test_a_backend_that_cannot_serve_falls_back_by_default_and_raises_by_name(monkeypatch):
    monkeypatch.setattr(dispatch, "CHOICES", (dispatch.Choice(("triton", "dense")),))
    assert called_backend(monkeypatch) == "dense"
    with pytest.raises(ValueError, match="'triton' needs"):
        spatial_decay_attention(*inputs(), GRID, backend="triton")
    monkeypatch.setenv("SDT_ATTENTION_BACKEND", "triton")
    with pytest.raises(ValueError, match="'triton' needs"):
        spatial_decay_attention(*inputs(), GRID)


def test_only_backends_that_prune_are_asked_to(monkeypatch):
    decays = []

    def attend(query, key, value, decay, scale):
        decays.append(decay.prune_eps)
        return value

    monkeypatch.setitem(BACKENDS, "blockwise", attend)
    tensors = inputs()
    for options in ({"backend": "blockwise"}, {}, {"backend": attend}, {"backend": "blockwise", "decomposed": True}):
        spatial_decay_attention(*tensors, GRID, prune_eps=1e-3, **options)
    assert decays == [1e-3, 1e-3, 1e-3, 0, 0]  # rows and columns are never pruned
    with pytest.raises(ValueError, match=r"'dense' skips no tokens: choose one of blockwise, triton"):
        spatial_decay_attention(*tensors, GRID, prune_eps=1e-3, backend="dense")
    monkeypatch.setattr(dispatch, "CHOICES", (dispatch.Choice(("dense",)),))
    spatial_decay_attention(*tensors, GRID, prune_eps=1e-3)
    for eps in (-1e-9, 0.51, math.nan):
        with pytest.raises(ValueError, match=r"prune_eps must be from 0 to 0\.5"):
            spatial_decay_attention(*tensors, GRID, prune_eps=eps)


def test_backends_that_decompose_get_the_grid_and_no_copies(monkeypatch):
    def attend(query, key, value, decay, scale, decomposed=False):
        assert (decomposed, decay.grid_size, value.shape) == (True, GRID, (2, 2, 12, 4))
        return value

    monkeypatch.setitem(BACKENDS, "lines", attend)
    monkeypatch.setattr(dispatch, "DECOMPOSES", ("lines",))
    spatial_decay_attention(*inputs(), GRID, backend="lines", decomposed=True)
    test_none_is_plain_attention_in_one_and_in_two_passes("lines")


def test_exports_hold_torchs_own_operators():
    class Attention(torch.nn.Module):
        def forward(self, *tensors):
            return spatial_decay_attention(*tensors, GRID)

    tensors = [x.detach() for x in inputs()]
    program = torch.export.export(Attention(), tuple(tensors))
    assert "sdt_diffusion" not in program.graph_module.code
    torch.testing.assert_close(program.module()(*tensors), spatial_decay_attention(*tensors, GRID))


@both_forms
@decaying
def test_gradients_by_finite_differences(variant, decomposed):
    tensors = inputs((2, 3), batch=1, heads=2, head_dim=2)

    def attend(*tensors):
        return spatial_decay_attention(*tensors, (2, 3), variant=variant, decomposed=decomposed)

    assert torch.autograd.gradcheck(attend, tensors)


@pytest.mark.parametrize("backend", ON_CPU)
def test_half_precision_keeps_the_decay_in_fp32(backend):
    # In bf16, decays of 16 to 32 come in steps of 1/8: 20.03 would become 20, and the weight 3% too large.
    query = key = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    value = torch.eye(2, dtype=torch.bfloat16)[None, None]
    gate = torch.tensor([[[-20.00, -20.06]]])
    output = spatial_decay_attention(query, key, value, gate, torch.ones(1), (1, 2), backend=backend)
    assert output.dtype == torch.bfloat16
    assert output[0, 0, 0, 1].item() == pytest.approx(math.exp(-20.03), rel=0.005)


@pytest.mark.parametrize("change", [(0, (3, 2, 12, 4)), (1, (1, 2, 12, 4)), (2, (2, 4, 12, 4)), (2, (2, 2, 24, 4))])
def test_shapes_that_do_not_fit_each_other_are_refused(change):
    tensors = inputs()
    tensors[change[0]] = torch.zeros(change[1], dtype=torch.float64)
    with pytest.raises(ValueError, match="the same samples, heads and tokens"):
        spatial_decay_attention(*tensors, GRID)


@pytest.mark.parametrize("backend", ON_CPU)
@both_forms
def test_bf16_is_close_to_fp32_forward_and_backward(backend, decomposed):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value, gate, alpha = inputs(dtype=torch.float32)
        cast = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        output = spatial_decay_attention(*cast, gate, alpha, GRID, backend=backend, decomposed=decomposed)
        output.float().square().sum().backward()
        results.append([output.float(), *(x.grad.float() for x in (*cast, gate, alpha))])
    for expected, result in zip(*results, strict=True):
        error = (result - expected).norm() / expected.norm()
        assert error < 0.02


@pytest.mark.parametrize("backend", ["reference", "dense", "factored"])
def test_bf16_gradients_of_near_sighted_tokens_are_not_noise(backend):
    """At -3 a token sees little but itself, and the gradients of query and key are small differences."""
    errors = []
    *qkv, gate, alpha = inputs((8, 8), head_dim=32, dtype=torch.float32)
    exact = [x.detach().bfloat16() for x in qkv]
    expected = gradients([x.double() for x in (*exact, gate * 3, alpha)], (8, 8), backend="reference")
    for found, wanted in zip(gradients([*exact, gate * 3, alpha], (8, 8), backend=backend), expected, strict=True):
        errors.append(float((found.double() - wanted).norm() / wanted.norm()))
    assert max(errors) < 0.006


def test_one_gate_for_all_tokens_broadcasts():
    query, key, value, gate, alpha = inputs()
    per_head = gate[:1, :, :1]
    output = spatial_decay_attention(query, key, value, per_head, alpha, GRID, variant="fixed")
    expected = spatial_decay_attention(query, key, value, per_head.expand_as(gate), alpha, GRID, variant="fixed")
    torch.testing.assert_close(output, expected)


def test_strong_decay_leaves_only_the_token_itself():
    query, key, value, gate, alpha = inputs()
    output = spatial_decay_attention(query, key, value, gate - 1, alpha * 1e4, GRID)
    torch.testing.assert_close(output, value)


@all_variants
def test_grid_that_does_not_match_the_tokens_is_refused(variant):
    with pytest.raises(ValueError, match=r"grid_size 5x5 means 25 tokens, but query and key have 12 and 12"):
        spatial_decay_attention(*inputs(), (5, 5), variant=variant)


def test_bad_arguments_are_refused():
    query, key, value, gate, alpha = inputs()
    with pytest.raises(ValueError, match="Unknown spatial_decay 'spatial'"):
        spatial_decay_attention(query, key, value, gate, alpha, GRID, variant="spatial")
    with pytest.raises(ValueError, match=r"Unknown attention backend 'cuda'.*reference, dense, blockwise"):
        spatial_decay_attention(query, key, value, gate, alpha, GRID, backend="cuda")
    with pytest.raises(ValueError, match="needs `gate` and `alpha`"):
        spatial_decay_attention(query, key, value, None, None, GRID)
    with pytest.raises(ValueError, match=r"`gate` has shape \(2, 2, 11\); \(2, 2, 12\) is needed"):
        spatial_decay_attention(query, key, value, gate[..., :-1], alpha, GRID)
    with pytest.raises(ValueError, match=r"`alpha` has shape \(1,\); \(2,\) is needed"):
        spatial_decay_attention(query, key, value, gate, alpha[:1], GRID)
