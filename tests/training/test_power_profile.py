import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdt_diffusion.training.ema import combination, gamma_of, inner_products


@given(st.floats(0.01, 0.28))
def test_gamma_gives_back_the_width(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert gamma > 0
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)


@given(st.floats(1, 1000), st.floats(0.5, 40), st.floats(1, 1000), st.floats(0.5, 40))
def test_inner_products_are_integrals_of_products(t, gamma, t2, gamma2):
    s = (np.arange(200_000) + 0.5) / 200_000 * min(t, t2)
    product = (gamma + 1) / t * (s / t) ** gamma * (gamma2 + 1) / t2 * (s / t2) ** gamma2
    integral = product.mean() * min(t, t2)
    assert inner_products([t], [gamma], [t2], [gamma2])[0, 0] == pytest.approx(integral, rel=1e-6, abs=1e-12)


def test_an_average_that_was_stored_is_taken_as_it_is():
    steps, gammas = [100, 100, 200, 200], [gamma_of(0.05), gamma_of(0.1)] * 2
    coefficients, error = combination(steps, gammas, 200, gamma_of(0.1))
    assert coefficients == pytest.approx([0, 0, 0, 1], abs=1e-6)
    assert error < 1e-5


def test_a_width_between_two_is_met_closely_and_from_few_snapshots_less_so():
    gammas = [gamma_of(0.05), gamma_of(0.1)]
    errors = []
    for count in (2, 8, 32):
        steps = np.repeat(np.linspace(0, 1000, count + 1)[1:], 2)
        coefficients, error = combination(steps, gammas * count, 1000, gamma_of(0.07))
        assert coefficients.sum() == pytest.approx(1, abs=5 * error)
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01
