import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdt_diffusion.training.ema import (
    EMAArguments,
    WeightAverage,
    combination,
    constant_profile,
    ema_profiles,
    inner_products,
    power_exponent,
    power_profile,
    ramped_profile,
)


def averages(profile, steps=30):
    """The average after each step, of a weight that begins at 0 and is set to 1, 2, 3 ..."""
    weights = {"weight": torch.zeros(1)}
    average = WeightAverage(weights, profile)
    values = []
    for step in range(1, steps + 1):
        weights["weight"].fill_(step)
        average.update(step)
        values.append(average.tensors["weight"].item())
    return values


def test_a_constant_average_begins_at_the_initial_weights():
    decay, expected = 0.9, [0.0]
    for step in range(1, 31):
        expected.append(decay * expected[-1] + (1 - decay) * step)
    assert averages(constant_profile(decay)) == pytest.approx(expected[1:], rel=1e-5)


@pytest.mark.parametrize("decay", [0.9999, 0.3])
def test_a_ramped_average_follows_diffusers_recursion(decay):
    average, expected = 0.0, []
    for step in range(1, 31):
        ramp = min((1 + step - 1) / (10 + step - 1), decay) if step > 1 else 0.0
        average = ramp * average + (1 - ramp) * step
        expected.append(average)
    assert averages(ramped_profile(decay)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_a_power_average_has_the_width_it_is_named_for(sigma_rel):
    """Mean and standard deviation of the time at which the averaged weights were made, as parts of the training."""
    steps = 4000
    profile, first, second = power_profile(sigma_rel), 0.0, 0.0
    for step in range(1, steps + 1):
        beta = profile(step)
        first = beta * first + (1 - beta) * step
        second = beta * second + (1 - beta) * step**2
    assert (second - first**2) ** 0.5 / steps == pytest.approx(sigma_rel, rel=1e-3)


def test_statistics_of_batch_norms_are_averaged_along_and_counts_copied():
    model = torch.nn.BatchNorm1d(1)
    average = WeightAverage(model.state_dict(), constant_profile(0.75))
    model.running_mean.fill_(8)
    model.num_batches_tracked.fill_(5)
    average.update(1)
    assert average.tensors["running_mean"].item() == pytest.approx(2.0)
    assert average.tensors["num_batches_tracked"] == 5


def test_averages_are_named_by_their_width():
    assert list(ema_profiles(EMAArguments())) == ["ema"]
    assert list(ema_profiles(EMAArguments(ema_profile="constant"))) == ["ema"]
    assert list(ema_profiles(EMAArguments(ema_profile="power"))) == ["ema_0.05", "ema_0.1"]
    assert ema_profiles(EMAArguments(use_ema=False)) == {}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ema_sigma_rel": [0.3]}, "ema_sigma_rel must be at least 0.001 and less than 0.288675.*, not 0.3"),
        ({"ema_sigma_rel": [0.0001]}, "ema_sigma_rel must be at least 0.001 and less than 0.288675.*, not 0.0001"),
        ({"ema_sigma_rel": [0.1, 0.10000001]}, "ema_sigma_rel must be different numbers"),
        ({"ema_decay": 1.1}, "ema_decay must be at least 0 and at most 1, not 1.1"),
        ({"ema_snapshot_steps": 10}, "ema_snapshot_steps needs ema_profile power"),
    ],
)
def test_widths_and_decays_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EMAArguments(**kwargs)


@given(st.floats(0.01, 0.28))
def test_gamma_gives_back_the_width(sigma_rel):
    gamma = power_exponent(sigma_rel)
    assert gamma > 0
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)


@given(st.floats(1, 1000), st.floats(0.5, 40), st.floats(1, 1000), st.floats(0.5, 40))
def test_inner_products_are_integrals_of_products(t, gamma, t2, gamma2):
    s = (np.arange(200_000) + 0.5) / 200_000 * min(t, t2)
    product = (gamma + 1) / t * (s / t) ** gamma * (gamma2 + 1) / t2 * (s / t2) ** gamma2
    integral = product.mean() * min(t, t2)
    assert inner_products([t], [gamma], [t2], [gamma2])[0, 0] == pytest.approx(integral, rel=1e-6, abs=1e-12)


def test_an_average_that_was_stored_is_taken_as_it_is():
    steps, gammas = [100, 100, 200, 200], [power_exponent(0.05), power_exponent(0.1)] * 2
    coefficients, error = combination(steps, gammas, 200, power_exponent(0.1))
    assert coefficients == pytest.approx([0, 0, 0, 1], abs=1e-6)
    assert error < 1e-5


def test_a_width_between_two_is_met_closely_and_from_few_snapshots_less_so():
    gammas = [power_exponent(0.05), power_exponent(0.1)]
    errors = []
    for count in (2, 8, 32):
        steps = np.repeat(np.linspace(0, 1000, count + 1)[1:], 2)
        coefficients, error = combination(steps, gammas * count, 1000, power_exponent(0.07))
        assert coefficients.sum() == pytest.approx(1, abs=5 * error)
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01
