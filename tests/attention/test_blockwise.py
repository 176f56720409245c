"""The blocks of the backend for CPUs; test_dispatch.py compares its results, test_pruning.py its pruning."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sdt_diffusion.attention import Decay, blockwise, spatial_decay_attention

from . import test_dispatch


@pytest.mark.parametrize(("block_bytes", "rows"), [(0, 5), (1152, 12), (2304, 12), (2**20, 12)])
def test_blocks_of_rows_and_heads_give_what_all_give(monkeypatch, block_bytes, rows):
    monkeypatch.setattr(blockwise, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(blockwise, "MIN_ROWS", rows)
    test_dispatch.test_backends_equal_the_reference_forward_and_backward(
        variant="context", decomposed=False, backend="blockwise"
    )


def test_the_blockwise_operator_keeps_torchs_rules_for_operators():
    query, key, value, gate, alpha = test_dispatch.inputs()
    half_decay = Decay(gate.detach(), alpha.detach(), test_dispatch.GRID).half_decay()
    arguments = (query, key, value, half_decay.requires_grad_(), None, *test_dispatch.GRID, False, 0.5)
    torch.library.opcheck(torch.ops.sdt_diffusion.blockwise_attention.default, arguments)


@pytest.mark.parametrize("spread", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blockwise_errs_at_most_twice_as_much_as_plain_attention(dtype, spread):
    tensors = [x.detach().to(torch.float32) for x in test_dispatch.inputs((16, 16), head_dim=64)]
    low = [(x * factor).to(dtype).requires_grad_() for x, factor in zip(tensors, (spread, spread, 1), strict=False)]
    exact = [x.detach().double().requires_grad_() for x in low]
    weights = torch.randn(low[2].shape, generator=torch.Generator().manual_seed(1))

    def results(attend, operands):
        output = attend(*operands)
        return [output, *torch.autograd.grad(output, operands, weights.to(output.dtype))]

    def decaying(*operands, backend="blockwise"):
        return spatial_decay_attention(*operands, tensors[3], tensors[4], (16, 16), backend=backend)

    def errors(found, wanted):
        return [((x - y).norm() / y.norm()).item() for x, y in zip(found, wanted, strict=True)]

    plain = F.scaled_dot_product_attention
    allowed = errors(results(plain, low), results(plain, exact))
    wanted = results(partial(decaying, backend="reference"), exact)
    for mine, other in zip(errors(results(decaying, low), wanted), allowed, strict=True):
        assert mine <= 2 * other


def test_blockwise_is_refused_elsewhere_than_on_cpus():
    tensors = [x.detach().to("meta") for x in test_dispatch.inputs()]
    with pytest.raises(ValueError, match="'blockwise' computes on CPUs, not on meta"):
        spatial_decay_attention(*tensors, test_dispatch.GRID, backend="blockwise")


def test_forward_mode_is_computed_by_the_reference_and_refused_by_name():
    query, *others = (x.detach() for x in test_dispatch.inputs())

    def tangent(backend):
        def attend(query):
            return spatial_decay_attention(query, *others, test_dispatch.GRID, backend=backend)

        return torch.func.jvp(attend, (query,), (query,))[1]

    assert tangent("reference").norm() > 0
    torch.testing.assert_close(tangent(None), tangent("reference"))
    with pytest.raises(ValueError, match="'blockwise' has no forward-mode derivatives: use 'reference'"):
        tangent("blockwise")
