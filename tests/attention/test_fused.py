"""The Triton kernels, in Triton's interpreter on the CPU, and compiled for GPUs that are not there.

All memory that a test does not fill holds NaN.
"""

import functools
import json
import subprocess
import sys

import pytest
import torch

from sdt_diffusion.attention import Decay, spatial_decay_attention
from sdt_diffusion.attention.formula import reference_attention
from sdt_diffusion.attention.pruning import tile_order
from tests.attention.cases import fused, inputs, pruned, results
from tests.scripts.process import ROOT

pytest.importorskip("triton", reason="triton comes with torch on Linux only")
pytestmark = [
    pytest.mark.usefixtures("strict_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # of the interpreter: infinities are meant
]


def error(found, expected):
    """Return the relative error of all numbers together."""
    return float(((found.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("variant", ["context", "content"])
@pytest.mark.parametrize(
    ("grid", "head_dim"),
    [
        ((1, 1), 16),
        ((7, 7), 64),
        ((12, 12), 16),
        ((5, 13), 72),
        ((9, 2), 80),
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


@pytest.mark.parametrize("gate", [-1e-6, -1e-3, -30.0, -80.0, -1e38])
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
    tensors = inputs((9, 10), batch=1, dtype=torch.bfloat16)
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
    grid, tensors = (3, 5), inputs((3, 5), batch=1)
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


@pytest.mark.parametrize("samples", [1, 2])
def test_tokens_may_lie_anywhere(samples):
    """As after tokens were dropped: a few of a grid, others in each sample."""
    tensors = inputs((3, 7))
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    kept = torch.stack([torch.randperm(64, generator=generator)[:21] for _ in range(samples)])
    coordinates = torch.stack([kept // 8, kept % 8], dim=-1)

    def by_hand(query, key, value, decay, scale):
        place = coordinates.double()
        distance = torch.cdist(place, place, p=1)[:, None]
        half_decay = decay.gate * decay.alpha[:, None] / 2
        bias = (half_decay[..., :, None] + half_decay[..., None, :]) * distance
        return (query @ key.transpose(-1, -2) * scale + bias).softmax(-1) @ value

    expected = results(by_hand, tensors, (3, 7), dtype=torch.float64)
    found = results(functools.partial(fused, coordinates=coordinates), tensors, (3, 7))
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)


def test_broadcast_and_frozen_gates_need_no_care():
    query, key, value, gate, alpha = inputs((4, 5))
    one = torch.full((1, 2, 1), -0.5, requires_grad=True)
    spread = one.expand(2, 2, 20)
    for mine, wanted in zip(
        torch.autograd.grad(fused(query, key, value, Decay(spread, alpha, (4, 5)), 0.2).sin().sum(), [one, query]),
        torch.autograd.grad(
            reference_attention(query, key, value, Decay(spread, alpha, (4, 5)), 0.2).sin().sum(), [one, query]
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    frozen = fused(query.detach(), key, value.detach(), Decay(gate.detach(), alpha.detach(), (4, 5)), 0.2)
    full = fused(query, key, value, Decay(gate, alpha, (4, 5)), 0.2)
    assert torch.equal(*(torch.autograd.grad(output.sin().sum(), key)[0] for output in (frozen, full)))


@pytest.mark.parametrize("eps", [0, 1e-3])
def test_autocast_and_checkpointing_change_no_bit(eps):
    grid, tensors = (4, 19), inputs((4, 19), batch=1, heads=1, gate=-80.0)

    def checkpointed(*args):
        with torch.autocast(args[0].device.type, torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(pruned(eps), *args, use_reentrant=False)

    for mine, plain in zip(results(checkpointed, tensors, grid), results(pruned(eps), tensors, grid), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("options", [{}, {"decomposed": True}])
def test_a_compiler_sees_one_operator_for_any_size(options):
    from torch._dynamo.testing import EagerAndRecordGraphs

    grid, eps, tensors = (4, 4), 0 if options else 1e-3, inputs((4, 4))
    recorded = EagerAndRecordGraphs()

    def attend(query, key, value, gate, alpha):
        return fused(query, key, value, Decay(gate, alpha, grid, prune_eps=eps), 0.25, **options)

    compiled = torch.compile(attend, backend=recorded, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*tensors), attend(*tensors))
    (graph,) = recorded.graphs
    names = [str(node.target) for node in graph.graph.nodes if "sdt_diffusion" in str(node.target)]
    bound = ["sdt_diffusion.needed_tiles.default"] if eps else []
    assert names == bound + ["sdt_diffusion.fused_attention.default"] * (1 + ("decomposed" in options))


def test_models_join_and_split_the_heads_without_copies():
    """As they do with a projection of shape (batch, tokens, heads * head_dim)."""
    grid, joined = (3, 3), torch.randn(2, 9, 3 * 32, requires_grad=True)
    qkv = joined.unflatten(-1, (3, 2, 16)).movedim(2, 0).transpose(2, 3).unbind()
    _, _, _, gate, alpha = inputs(grid)
    output = fused(*qkv, Decay(gate, alpha, grid), 0.25)
    assert output.transpose(1, 2).is_contiguous()
    for gradient in torch.autograd.grad(output.sin().sum(), qkv):
        assert gradient.transpose(1, 2).is_contiguous()


def test_operators_are_registered_as_torch_wants_them():
    from sdt_diffusion.attention.fused import _forward

    tensors = [x.detach().contiguous().requires_grad_() for x in inputs((4, 4))[:4]]
    torch.library.opcheck(_forward, (*tensors, None, None, None, 4, [1, 0, 1], 0.25, False))
    order, needed = tile_order((4, 4), tensors[0].device).int(), torch.ones(2, 2, 1, 1, dtype=torch.bool)
    arguments = (*tensors, None, order, needed, 4, [1, 0, 1], 0.25, False)
    torch.library.opcheck(_forward, arguments, test_utils=("test_schema", "test_faketensor"))


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


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"variant": "raster"}, {}, "cannot compute the variant 'raster'"),
        ({"grid_size": (3, 4)}, {}, "grid_size 3x4 means 12 tokens, but query has 9"),
        ({"gate": torch.zeros(1, 2, 9)}, {}, "`gate` and `alpha` have shapes"),
        ({}, {"coordinates": torch.zeros(9, 2)}, "`coordinates` has shape"),
        ({}, {"coordinates": torch.zeros(1, 9, 2), "decomposed": True}, "need the whole grid"),
        ({"prune_eps": 0.1}, {"coordinates": torch.zeros(1, 9, 2)}, "need the whole grid"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, options, message):
    *qkv, gate, alpha = inputs((3, 3))
    with pytest.raises(ValueError, match=message):
        fused(*qkv, Decay(gate, alpha, (3, 3))._replace(**change), 0.2, **options)


def test_query_key_and_value_of_other_shapes_or_dtypes_are_refused():
    query, key, value, gate, alpha = inputs((3, 3))
    for others in ((key[:, :, :8], value), (key.half(), value), (key, value[:1])):
        with pytest.raises(ValueError, match="query, key and value of one shape and dtype"):
            fused(query, *others, Decay(gate, alpha, (3, 3)), 0.2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asserts what a machine without a GPU says")
def test_without_a_gpu_it_is_refused_by_name(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="The backend 'triton' needs a GPU"):
        spatial_decay_attention(*inputs((3, 3)), (3, 3), backend="triton")


def test_no_kernel_spills_at_head_size_64(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-m", "tests.attention.offline"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == 12
    assert [each for each in found if each["spilled_bytes"]] == []
    assert all(each["registers"] <= 255 and each["shared_bytes"] <= 99 << 10 for each in found)
