import pytest
import torch

from sdt_diffusion.attention import ContextAwareGate, FixedGate, build_gate, spatial_decay


def rmt_decay(heads, initial_value, heads_range):
    """RMT's table of decays, from its formula."""
    exponents = initial_value + heads_range * torch.arange(heads, dtype=torch.float64) / heads
    return torch.log(1 - 2**-exponents)


@pytest.mark.parametrize("heads", [1, 4, 16])
@pytest.mark.parametrize("heads_range", [4.0, 6.0])
def test_starts_as_rmts_fixed_decay_whatever_it_sees(heads, heads_range):
    gate = ContextAwareGate(8, heads, conditioning_dim=6, heads_range=heads_range)
    values, alpha = gate(torch.randn(2, 5, 8), torch.randn(2, 6))
    expected = rmt_decay(heads, 2.0, heads_range)[None, :, None].expand(2, heads, 5)
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(alpha, torch.ones(heads))
    fixed, fixed_alpha = FixedGate(heads, 2.0, heads_range)(torch.randn(2, 5, 8))
    torch.testing.assert_close(values, fixed.expand_as(values), rtol=1e-6, atol=1e-6)
    assert torch.equal(alpha, fixed_alpha)


def test_equals_log_sigmoid_of_content_bias_and_conditioning():
    torch.manual_seed(0)
    gate = ContextAwareGate(8, 3, conditioning_dim=6).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    x, c = torch.randn(2, 5, 8).double(), torch.randn(2, 6).double()
    values, alpha = gate(x, c)
    logits = x @ gate.proj.weight.T + gate.proj.bias + (c @ gate.conditioning_proj.weight.T)[:, None]
    torch.testing.assert_close(values, torch.log(torch.sigmoid(logits)).transpose(1, 2))
    assert (values <= 0).all()
    assert (alpha > 0).all()


def test_gradients_reach_tokens_conditioning_and_alpha():
    torch.manual_seed(0)
    gate = ContextAwareGate(4, 2, conditioning_dim=3).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 3, 4).double().requires_grad_()
    c = torch.randn(1, 3).double().requires_grad_()
    log_alpha = gate.log_alpha.detach().clone().requires_grad_()

    def run(x, c, log_alpha):
        return torch.func.functional_call(gate, {"log_alpha": log_alpha}, (x, c))

    assert torch.autograd.gradcheck(run, (x, c, log_alpha))


def test_every_parameter_learns_from_the_start():
    gate = ContextAwareGate(4, 2, conditioning_dim=3)
    values, alpha = gate(torch.randn(2, 5, 4), torch.randn(2, 3))
    (values * alpha[:, None]).square().sum().backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad.abs().min() > 0, name


def test_autocast_and_bf16_inputs_compute_in_fp32():
    torch.manual_seed(0)
    gate = ContextAwareGate(64, 2)
    torch.nn.init.normal_(gate.proj.weight)
    x = torch.randn(1, 9, 64).bfloat16()
    expected = gate(x.float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        values, alpha = gate(x)
    assert values.dtype == alpha.dtype == torch.float32
    assert torch.equal(values, expected)


def test_a_gate_built_for_conditioning_refuses_to_run_without_it():
    gate = ContextAwareGate(8, 2, conditioning_dim=6)
    with pytest.raises(ValueError, match="needs conditioning"):
        gate(torch.randn(2, 5, 8))


def test_fixed_gate_has_nothing_to_learn_or_to_round():
    gate = FixedGate(4)
    assert not list(gate.parameters())
    assert not list(gate.buffers())
    values, _ = gate.bfloat16()(torch.zeros(1, 3, 8, dtype=torch.bfloat16))
    torch.testing.assert_close(values[0, :, 0].double(), rmt_decay(4, 2.0, 6.0), rtol=1e-6, atol=1e-6)


def test_each_variant_gets_its_gate():
    assert build_gate("none", 8, 2) is None
    assert isinstance(build_gate("fixed", 8, 2), FixedGate)
    for variant in ("context", "content", "raster"):
        assert isinstance(build_gate(variant, 8, 2), ContextAwareGate)


class TestStartingWithoutDecay:
    def test_no_logit_changes_in_fp32_and_alpha_has_a_gradient_of_order_one(self):
        torch.manual_seed(0)
        gate = ContextAwareGate(8, 4, decay_start="none")
        values, alpha = gate(torch.randn(1, 16 * 16, 8))
        decay = spatial_decay(values, alpha, (16, 16))
        assert 0 < decay.abs().max() < 1e-6
        decay.sum().backward()
        unit = spatial_decay(values.detach(), torch.ones(4), (16, 16)).sum((0, 2, 3))
        torch.testing.assert_close(gate.signed_alpha.grad, unit)

    def test_an_alpha_that_is_pushed_below_zero_still_decays_and_still_learns(self):
        gate = ContextAwareGate(8, 2, decay_start="none")
        with torch.no_grad():
            gate.signed_alpha.copy_(torch.tensor([-0.5, 0.5]))
        _, alpha = gate(torch.randn(1, 4, 8))
        assert torch.equal(alpha, torch.tensor([0.5, 0.5]))
        alpha.sum().backward()
        assert gate.signed_alpha.grad.tolist() == [-1, 1]

    def test_reset_returns_to_the_start(self):
        gate = ContextAwareGate(8, 2, decay_start="none")
        start = {name: value.clone() for name, value in gate.state_dict().items()}
        for parameter in gate.parameters():
            torch.nn.init.ones_(parameter)
        gate.reset_parameters()
        assert all(torch.equal(value, start[name]) for name, value in gate.state_dict().items())

    def test_another_start_is_refused(self):
        with pytest.raises(ValueError, match="Unknown decay_start 'weak': choose one of rmt, none"):
            ContextAwareGate(8, 2, decay_start="weak")
