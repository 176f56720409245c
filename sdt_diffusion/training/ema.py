"""Moving averages of the weights, several widths at once.

Power-function averages and their combination: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3. The average at time t of width sigma_rel gives the weights at time s <= t the share

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1),    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ..utils.ranges import RANGE_KEY, CheckedArguments, Range, at_least, check_number

#: Widths that power averages can have: less than 1 / sqrt(12), that of a plain mean.
SIGMA_REL = Range(0.001, 12**-0.5, with_most=False)
DECAY = Range(0, 1)


@dataclass(frozen=True)
class EMAArguments(CheckedArguments):
    """Moving averages of the weights; DiT's is `ema_profile="constant"`."""

    use_ema: bool = field(default=True, metadata={"help": "Average the weights; the average is what is saved."})
    ema_profile: Literal["ramped", "constant", "power"] = field(
        default="ramped",
        metadata={"help": "Decay that rises to ema_decay, is always ema_decay (DiT), or EDM2's of ema_sigma_rel."},
    )
    ema_decay: float = field(
        default=0.9999, metadata={"help": "Decay of a ramped or constant average.", RANGE_KEY: DECAY}
    )
    ema_sigma_rel: list[float] = field(
        default_factory=lambda: [0.05, 0.1],
        metadata={"help": "Widths of power averages, as fractions of the training; the first is what is saved."}
        | {RANGE_KEY: SIGMA_REL},
    )
    ema_snapshot_steps: int = field(
        default=0,
        metadata={
            "help": "Steps between snapshots of power averages, for train/reconstruct_ema.py; 0 for none.",
            "resumable": True,
        }
        | at_least(0),
    )

    def __post_init__(self):
        super().__post_init__()
        names = {f"{sigma_rel:g}" for sigma_rel in self.ema_sigma_rel}
        if len(names) != len(self.ema_sigma_rel) or not names:
            raise ValueError(f"ema_sigma_rel must be different numbers, not {self.ema_sigma_rel}.")
        if self.ema_snapshot_steps and not (self.use_ema and self.ema_profile == "power"):
            raise ValueError("ema_snapshot_steps needs ema_profile power: only its averages can be combined.")


def power_exponent(sigma_rel: float) -> float:
    """Return the exponent of the profile of standard deviation `sigma_rel`, as a fraction of the training so far.

    Raises:
        ValueError: If it is not in `SIGMA_REL`.
    """
    check_number("sigma_rel", sigma_rel, SIGMA_REL)
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def inner_products(
    steps: Sequence[float] | np.ndarray,
    gammas: Sequence[float],
    other_steps: Sequence[float] | np.ndarray,
    other_gammas: Sequence[float],
) -> np.ndarray:
    """Integrate the products of two profiles, shape (first, second).

    With u the earlier of their times t and t':

        (gamma + 1) (gamma' + 1) / (gamma + gamma' + 1) * (u/t)^(gamma + 1) (u/t')^(gamma' + 1) / u
    """
    t, g = np.asarray(steps, float)[:, None], np.asarray(gammas, float)[:, None]
    t2, g2 = np.asarray(other_steps, float)[None], np.asarray(other_gammas, float)[None]
    u = np.minimum(t, t2)
    shares = (u / t) ** (g + 1) * (u / t2) ** (g2 + 1)
    return (g + 1) * (g2 + 1) / (g + g2 + 1) * shares / u


def combination(
    steps: Sequence[float], gammas: Sequence[float], wanted_step: float, wanted_gamma: float
) -> tuple[np.ndarray, float]:
    """Fit the profile of a wanted average by those of stored averages, in the least-squares sense.

    Args:
        steps: When the averages were stored.
        gammas: Exponents of their profiles.
        wanted_step: Step at which the wanted average ends.
        wanted_gamma: Exponent of its profile.

    Returns:
        A coefficient for each average, and the distance of the fit from the wanted profile, relative to its norm.
    """
    scale = wanted_step  # so that the solver's threshold for rank does not depend on the length of the run
    times = np.asarray(steps, float) / scale
    gram = inner_products(times, gammas, times, gammas)
    target = inner_products(times, gammas, [1.0], [wanted_gamma])[:, 0]
    coefficients = np.linalg.lstsq(gram, target, rcond=1e-14)[0]
    norm = inner_products([1.0], [wanted_gamma], [1.0], [wanted_gamma])[0, 0]
    error = norm - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(error, 0.0) / norm))


#: Function of the optimizer step, counted from 1, that gives the weight of the old average.
Profile = Callable[[int], float]


def constant_profile(decay: float) -> Profile:
    """Return DiT's profile: the same decay from the first step, starting at the initial weights."""
    check_number("decay", decay, DECAY)
    return lambda step: decay


def ramped_profile(decay: float) -> Profile:
    """Return diffusers' profile: (1 + n) / (10 + n) after n steps, up to `decay`, starting after the first step."""
    check_number("decay", decay, DECAY)
    return lambda step: 0.0 if step == 1 else min(step / (9 + step), decay)


def power_profile(sigma_rel: float) -> Profile:
    """Return EDM2's profile, whose width is always the same fraction of the training so far (section 3.1).

    The old average's weight (1 - 1/t)^(gamma + 1) gives the weights of step t a share proportional to t^gamma.
    """
    gamma = power_exponent(sigma_rel)
    return lambda step: (1 - 1 / step) ** (gamma + 1)


def ema_profiles(args: EMAArguments) -> dict[str, Profile]:
    """Return the profiles that the arguments ask for, by the suffix of their folders; the first is the saved one's."""
    if not args.use_ema:
        return {}
    if args.ema_profile == "power":
        return {f"ema_{sigma_rel:g}": power_profile(sigma_rel) for sigma_rel in args.ema_sigma_rel}
    profile = constant_profile if args.ema_profile == "constant" else ramped_profile
    return {"ema": profile(args.ema_decay)}


class WeightAverage:
    """Moving average of a model's weights under one profile.

    Statistics of batch norms are averaged too, as in timm. Each process averages its part of a sharded model.

    Args:
        sources: Names and tensors of the model, which optimizer steps change in place.
        profile: See `ema_profiles`.
    """

    def __init__(self, sources: dict[str, torch.Tensor], profile: Profile):
        self.profile = profile
        self.tensors = {name: tensor.detach().clone() for name, tensor in sources.items()}
        pairs = [(local_part(self.tensors[name]), local_part(source.detach())) for name, source in sources.items()]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def update(self, step: int) -> None:
        """Average in the weights after optimizer step `step`, counted from 1."""
        averages, sources = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, sources, 1 - self.profile(step))
        for copy, source in self._copied:
            copy.copy_(source)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that FSDP2 may have sharded, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
