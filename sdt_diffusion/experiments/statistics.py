"""Compare variants over seeds: paired differences with Student's t, and steps to reach a loss."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

#: Probability that an interval holds the mean.
CONFIDENCE = 0.95


class PairedDifference(NamedTuple):
    """Differences of pairs, such as the losses of two variants of equal seeds.

    Attributes:
        num_pairs: Number of pairs.
        mean: Mean difference.
        deviation: Standard deviation of the differences, n - 1 in the denominator; NaN of one pair, as all below.
        low: Lower end of the mean's 95% interval by Student's t with n - 1 degrees of freedom.
        high: Upper end.
        p_value: Two-sided probability of a mean so far from 0 without a difference, by the paired t-test.
    """

    num_pairs: int
    mean: float
    deviation: float
    low: float
    high: float
    p_value: float


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """Return the differences `values - baseline`, pair by pair.

    Raises:
        ValueError: If there are none, or not as many of both, or one is not finite.
    """
    if not len(values) or len(values) != len(baseline):
        raise ValueError(f"Pairs need values of both; there are {len(values)} and {len(baseline)}.")
    differences = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    if not np.isfinite(differences).all():
        raise ValueError(f"The values of pairs must be finite, not {list(values)} and {list(baseline)}.")
    count, mean = len(differences), float(differences.mean())
    if count == 1:
        return PairedDifference(count, mean, math.nan, math.nan, math.nan, math.nan)
    deviation = float(differences.std(ddof=1))
    error = deviation / math.sqrt(count)
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    distance = abs(mean) / error if error else math.inf if mean else 0.0
    p_value = 2 * float(stats.t.sf(distance, count - 1))
    return PairedDifference(count, mean, deviation, mean - reach, mean + reach, p_value)


def steps_to_reach(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Return the step at which a curve first is at or below a loss, interpolated between its points.

    Args:
        steps: Steps of the points, rising.
        losses: Loss at each of them.
        target: The loss to reach.

    Returns:
        The step, or `None` if the curve does not reach it.

    Raises:
        ValueError: If there are not as many losses as steps, or the steps do not rise.
    """
    if len(steps) != len(losses) or any(later <= step for step, later in itertools.pairwise(steps)):
        raise ValueError(f"A curve needs a loss for each of its rising steps, not {len(losses)} for {list(steps)}.")
    for index, loss in enumerate(losses):
        if loss <= target:
            if index == 0:
                return float(steps[0])
            step, before = steps[index - 1], losses[index - 1]
            return float(step + (steps[index] - step) * (before - target) / (before - loss))
    return None
