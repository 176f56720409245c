"""Exponential moving averages of the weights: several widths at once."""

from collections.abc import Callable

import torch

from .arguments import OptimizationArguments
from .power_profile import gamma_of
from .sharded import local

#: Optimizer step, counted from 1, to the weight of the old average.
Profile = Callable[[int], float]


def constant_profile(decay: float) -> Profile:
    """DiT's: the same decay from the first step, beginning at the initial weights."""
    return lambda step: decay


def ramped_profile(decay: float) -> Profile:
    """diffusers': (1 + n) / (10 + n) after n steps, up to `decay`, beginning at the weights after the first step."""
    return lambda step: 0.0 if step == 1 else min(step / (9 + step), decay)


def power_profile(sigma_rel: float) -> Profile:
    """An average whose width is always the same part of the training so far (Karras et al. 2024, section 3.1).

    The old average's weight (1 - 1/t)^(gamma + 1) gives the weights of step t a share proportional to t^gamma.
    """
    gamma = gamma_of(sigma_rel)
    return lambda step: (1 - 1 / step) ** (gamma + 1)


def profiles(args: OptimizationArguments) -> dict[str, Profile]:
    """The averages that the arguments ask for, by the ending of their folders' names; the first is the product."""
    if not args.use_ema:
        return {}
    if args.ema_profile == "power":
        return {f"ema_{sigma_rel:g}": power_profile(sigma_rel) for sigma_rel in args.ema_sigma_rel}
    profile = constant_profile if args.ema_profile == "constant" else ramped_profile
    return {"ema": profile(args.ema_decay)}


class WeightAverage:
    """The average of a model's weights under one profile.

    Statistics of batch norms are averaged along, as timm does. Of a sharded model, each process averages its part.

    Args:
        sources: Names and tensors of the model, which optimizer steps change in place.
        profile: See `profiles`.
    """

    def __init__(self, sources: dict[str, torch.Tensor], profile: Profile):
        self.profile = profile
        self.tensors = {name: tensor.detach().clone() for name, tensor in sources.items()}
        pairs = [(local(self.tensors[name]), local(source.detach())) for name, source in sources.items()]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def step(self, step: int) -> None:
        """Averages in the weights after optimizer step `step`, counted from 1."""
        averages, sources = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, sources, 1 - self.profile(step))
        for copy, source in self._copied:
            copy.copy_(source)
