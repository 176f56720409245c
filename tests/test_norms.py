"""RMSNorm on CPUs, against torch's from parts."""

import pytest
import torch
from torch import nn

from sdt_diffusion.norms import RMSNorm, build_norm


def pair(affine=True, dtype=torch.float64):
    torch.manual_seed(0)
    ours, torchs = (kind(6, eps=1e-3, elementwise_affine=affine, dtype=dtype) for kind in (RMSNorm, nn.RMSNorm))
    if affine:
        nn.init.normal_(ours.weight)
        torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def tokens(dtype=torch.float64):
    return torch.randn(2, 5, 6, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("affine", [True, False])
def test_values_gradients_and_tangents_are_torchs(affine):
    results = []
    for norm in pair(affine):
        x = tokens()
        output = norm(x)
        gradients = torch.autograd.grad(output.pow(3).sum(), [x, *norm.parameters()])
        tangent = torch.func.jvp(norm, (tokens(),), (tokens().detach().cos(),))[1]
        per_token = torch.func.vmap(torch.func.grad(lambda token, norm=norm: norm(token).pow(3).sum()))(x[0])
        results.append([output, *gradients, tangent, per_token])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


def test_derivatives_of_every_kind_and_order_are_those_of_differences():
    norm = pair(affine=False)[0]
    assert torch.autograd.gradcheck(norm, tokens(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm, tokens(), check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_types_are_computed_in_fp32(dtype):
    norm, _ = pair(dtype=dtype)
    output = norm(tokens(dtype))
    exact = pair(dtype=torch.float32)[0].to(dtype).float()(tokens(dtype).float())
    assert output.dtype == dtype
    torch.testing.assert_close(output, exact.to(dtype))
    assert norm(1e4 * tokens(dtype)).isfinite().all()  # squares that fp16 does not hold


def test_the_default_epsilon_is_that_of_the_type():
    x = 1e-4 * tokens(torch.float32)
    torch.testing.assert_close(RMSNorm(6)(x), nn.RMSNorm(6)(x))


def test_only_rms_is_rms():
    assert isinstance(build_norm("rms", 6, 1e-6, affine=False), nn.RMSNorm)
    assert type(build_norm("layer", 6, 1e-6, affine=True)) is nn.LayerNorm
