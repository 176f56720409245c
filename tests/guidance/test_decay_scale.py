"""`decay_scale` of the transformer, which decay guidance uses."""

import copy
import math

import pytest
import torch

from sdt_diffusion.attention import SPATIAL_DECAY_VARIANTS

DECAYING = [variant for variant in SPATIAL_DECAY_VARIANTS if variant != "none"]


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(3, 3, 8, 8, generator=generator)
    return noisy, torch.tensor([100.0, 500.0, 900.0]), torch.tensor([0, 2, 5])


@torch.no_grad()
def with_alpha_times(model, factor):
    """Return a copy whose decay is stronger by a factor for each head."""
    model = copy.deepcopy(model)
    for block in model.transformer_blocks:
        block.attn.gate.log_alpha += torch.as_tensor(factor).log()
    return model


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("variant", [variant for variant in DECAYING if variant != "fixed"])
@torch.no_grad()
def test_each_sample_has_a_decay_of_its_own_as_if_alpha_were_another(make_model, inputs, variant, decomposed):
    model = make_model(spatial_decay=variant, decomposed=decomposed)
    factors = torch.tensor([1.0, 3.0, 0.25])
    together = model(*inputs, decay_scale=factors).sample
    for row, factor in enumerate(factors):
        alone = with_alpha_times(model, factor)(*inputs).sample
        torch.testing.assert_close(together[row], alone[row], rtol=1e-5, atol=1e-5)
    assert (together[1] - model(*inputs).sample[1]).abs().max() > 1e-3


@torch.no_grad()
def test_each_head_may_have_a_factor(make_model, inputs):
    model, factors = make_model(), torch.tensor([1.0, 5.0])
    expected = with_alpha_times(model, factors)(*inputs).sample
    torch.testing.assert_close(model(*inputs, decay_scale=factors.expand(3, 2)).sample, expected)


@torch.no_grad()
def test_a_fixed_decay_is_scaled_too(make_model, inputs):
    model = make_model(spatial_decay="fixed")
    doubled = copy.deepcopy(model)
    for block in doubled.transformer_blocks:
        gate = block.attn.gate
        gate.exponents = [-math.log2(1 - (1 - 2**-a) ** 2) for a in gate.exponents]  # log(1 - 2^-a), doubled
    torch.testing.assert_close(model(*inputs, decay_scale=torch.full((3,), 2.0)).sample, doubled(*inputs).sample)


@torch.no_grad()
@pytest.mark.parametrize("variant", DECAYING)
def test_a_factor_of_one_changes_nothing(make_model, inputs, variant):
    model = make_model(spatial_decay=variant)
    assert torch.equal(model(*inputs, decay_scale=torch.ones(3)).sample, model(*inputs).sample)


def test_checkpointing_passes_the_factors(make_model, inputs):
    model, factors = make_model(), torch.tensor([1.0, 3.0, 0.25])
    expected = model(*inputs, decay_scale=factors).sample
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(model(*inputs, decay_scale=factors).sample, expected)


def test_factors_that_do_not_fit_are_refused(make_model, inputs):
    with pytest.raises(ValueError, match="its spatial_decay is 'none'"):
        make_model(spatial_decay="none")(*inputs, decay_scale=torch.ones(3))
    for shape in ((2,), (3, 3), (3, 2, 16), ()):
        with pytest.raises(ValueError, match=r"decay_scale, of shape .* must have shape \(3,\) or \(3, 2\)"):
            make_model()(*inputs, decay_scale=torch.ones(shape))
