"""Set the steps of a run: a number of them, or timesteps or noise levels that are given."""

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers import SchedulerMixin

from ..utils.ranges import Range, check_value
from .schedulers import is_flow


def set_schedule(
    scheduler: SchedulerMixin,
    num_steps: int | None,
    device: torch.device | str | None = None,
    timesteps: Any = None,
    sigmas: Any = None,
    uniform: bool = False,
) -> int:
    """Set the steps of a run: a number of them, or given timesteps or noise levels.

    Args:
        scheduler: The scheduler.
        num_steps: Number of steps; may be `None` if `timesteps` or `sigmas` are given, whose number it must be else.
        device: Where the scheduler's timesteps are to be.
        timesteps: The model's timesteps, from noise to image, of which flows have fractions too.
        sigmas: Noise levels in the scheduler's unit, from noise to image without the 0 at the end; the scheduler
            shifts them by its `shift`.
        uniform: Whether N steps of a flow are to be worth N unless others are given: Euler's and Heun's methods take
            1 - i/N, while diffusers' own end at 0.001, and DEIS and SASolver end at the image, while diffusers' own
            repeat the last noise level, so that noise of 1/N stays in the image.

    Returns:
        The number of steps.

    Raises:
        ValueError: If both are given, they are not decreasing or out of range, or the scheduler does not take them.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps and sigmas are two ways to give the same steps: leave one out.")
    config, flow = scheduler.config, is_flow(scheduler)
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    if timesteps is None and sigmas is None:
        assert num_steps is not None
        if uniform and type(scheduler) is diffusers.FlowMatchEulerDiscreteScheduler and not _spaces_sigmas(config):
            scheduler.set_timesteps(device=device, sigmas=[1 - i / num_steps for i in range(num_steps)])
        else:
            scheduler.set_timesteps(num_steps, device=device)
            if uniform and flow:
                _end_at_image(scheduler, num_steps)
        return num_steps

    name, given = ("timesteps", timesteps) if sigmas is None else ("sigmas", sigmas)
    levels = _levels(name, given, num_steps, scheduler)
    taken, expected = name, levels
    if flow:
        shift = config.get("shift", config.get("flow_shift", 1.0))
        if sigmas is None and "sigmas" in accepted:  # these schedulers shift what they are given
            level = levels / config.num_train_timesteps
            taken, levels = "sigmas", level / (shift - (shift - 1) * level)
        elif sigmas is not None:
            expected = shift * levels / (1 + (shift - 1) * levels) * config.num_train_timesteps
    ignored = taken == ("timesteps" if flow else "sigmas") and "use_flow_sigmas" in config
    if taken not in accepted or ignored:
        raise ValueError(f"{type(scheduler).__name__} takes no {name}: give num_inference_steps, or swap it.")
    if isinstance(scheduler, diffusers.EulerDiscreteScheduler) and taken == "sigmas":
        levels = np.append(levels, 0.0)
    scheduler.set_timesteps(device=device, **{taken: levels})
    found = scheduler.timesteps.double().cpu().unique().flip(0).numpy()
    # Some round the timesteps of flows to whole ones.
    if len(found) != len(expected) or ((flow or sigmas is None) and not np.allclose(found, expected, rtol=0, atol=1)):
        raise ValueError(
            f"{type(scheduler).__name__} of this config takes steps of its own in place of {name}: swap it."
        )
    return len(expected)


def _end_at_image(scheduler: Any, num_steps: int) -> None:
    """Mend the noise levels of schedulers whose last evaluation diffusers wastes, or that stop before the image."""
    sigmas, steps = scheduler.sigmas, scheduler.config.num_train_timesteps
    if type(scheduler) is diffusers.FlowMatchHeunDiscreteScheduler:
        # Two evaluations a step but the last, which is Euler's, as in EDM: at 0.001, models know no direction.
        levels, shift = 1 - torch.arange(num_steps, device=sigmas.device) / num_steps, scheduler.config.shift
        levels = (shift * levels / (1 + (shift - 1) * levels)).repeat_interleave(2)[1:]  # (2N - 1,)
        scheduler.sigmas, scheduler.timesteps = torch.cat([levels, levels.new_zeros(1)]), steps * levels
    elif sigmas[-1] == sigmas[-2]:
        sigmas[-1] = 1 / steps  # as near to 0 as diffusers' other schedulers go; this one takes logarithms


def _spaces_sigmas(config: Mapping[str, Any]) -> bool:
    return any(config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))


def _levels(name: str, values: Any, count: int | None, scheduler: SchedulerMixin) -> np.ndarray:
    """Check timesteps or noise levels that a user gives, and return them as an array."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{name} must be a list of numbers, not {values!r:.60}.")
    flow, steps = is_flow(scheduler), scheduler.config.num_train_timesteps
    whole = name == "timesteps" and not flow
    allowed = Range(0, steps - 1) if whole else Range(0, steps if name == "timesteps" else 1 if flow else 1e6, False)
    for value in values:
        check_value(name, value, (int if whole else float,), allowed)
    if any(after >= before for before, after in itertools.pairwise(values)):
        raise ValueError(f"{name} must decrease, from noise to image, but are {list(values)!r:.60}.")
    if count is not None and len(values) != count:
        raise ValueError(f"{name} are {len(values)}, but num_inference_steps is {count}: leave one of them out.")
    return np.array(values)
