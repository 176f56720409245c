"""Power-function averages of the weights, and combining some of them into another (Karras et al. 2024, section 3).

The average at time t of width sigma_rel gives the weights at time s <= t the share

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1),    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
"""

from collections.abc import Sequence

import numpy as np


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile whose standard deviation, as a part of the training so far, is `sigma_rel`.

    Raises:
        ValueError: If it is not between 0.001 and 1 / sqrt(12), the width of a plain mean.
    """
    if not 0.001 <= sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel must lie between 0.001 and {12**-0.5:.3f}, not {sigma_rel}.")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def inner_products(
    steps: Sequence[float], gammas: Sequence[float], other_steps: Sequence[float], other_gammas: Sequence[float]
) -> np.ndarray:
    """Integrals of products of two profiles, shape (first, second).

    With u the earlier of their times t and t', and everything in units of it:
    (gamma + 1) (gamma' + 1) / (gamma + gamma' + 1) * (u/t)^(gamma + 1) (u/t')^(gamma' + 1) / u.
    """
    t, g = np.asarray(steps, float)[:, None], np.asarray(gammas, float)[:, None]
    t2, g2 = np.asarray(other_steps, float)[None], np.asarray(other_gammas, float)[None]
    u = np.minimum(t, t2)
    shares = (u / t) ** (g + 1) * (u / t2) ** (g2 + 1)
    return (g + 1) * (g2 + 1) / (g + g2 + 1) * shares / u


def combination(
    steps: Sequence[float], gammas: Sequence[float], wanted_step: float, wanted_gamma: float
) -> tuple[np.ndarray, float]:
    """How to combine averages into another: the least squares fit of its profile by theirs.

    Args:
        steps: When the averages were stored.
        gammas: Exponents of their profiles.
        wanted_step: Where the other average ends.
        wanted_gamma: Exponent of its profile.

    Returns:
        A coefficient for each average, and the distance of the fit from the wanted profile, relative to its norm.
    """
    scale = wanted_step  # of order one, so that the solver's threshold for rank means the same in any run
    steps = np.asarray(steps, float) / scale
    gram = inner_products(steps, gammas, steps, gammas)
    target = inner_products(steps, gammas, [1.0], [wanted_gamma])[:, 0]
    coefficients = np.linalg.lstsq(gram, target, rcond=1e-14)[0]
    norm = inner_products([1.0], [wanted_gamma], [1.0], [wanted_gamma])[0, 0]
    error = norm - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(error, 0.0) / norm))
