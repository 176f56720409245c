"""Turn models of other repositories into pipelines of this package with the same outputs, and back."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import nn

from ..sdt.schedulers import DIT_SCHEDULE
from ..utils.reading import shortened


@dataclass(frozen=True)
class Source:
    """What a pipeline is built from.

    Args:
        name: What the model is, for messages.
        config: Config of an `SDTTransformer2DModel`, without its decay.
        weights: Its weights, without gates, in fp32.
        scheduler: Samples as its repository does.
        num_inference_steps: Steps that its repository samples with; `None` to leave them open.
        uniform_sigmas: Whether these are Euler's at noise levels 1 - i/N; see `SDTPipeline`.
        vae: Its VAE, if it comes with one.
        id2label: Its class names, if it comes with them.
    """

    name: str
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    scheduler: SchedulerMixin
    num_inference_steps: int | None = None
    uniform_sigmas: bool = False
    vae: nn.Module | None = None
    id2label: dict[int, str] = field(default_factory=dict)


def ddpm_scheduler(learns_variance: bool) -> DDPMScheduler:
    """Return DiT's published sampler: DDPM with a learned variance, or beta, at even timesteps from 999 on."""
    variance = "learned_range" if learns_variance else "fixed_large"
    return DDPMScheduler(**DIT_SCHEDULE, variance_type=variance, timestep_spacing="linspace", clip_sample=False)


def flow_scheduler(shift: float = 1.0) -> FlowMatchEulerDiscreteScheduler:
    """Return Euler's method for flows, whose noise levels s become shift s / (1 + (shift - 1) s)."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)


def check_names(found: Collection[str], expected: Collection[str], name: str) -> None:
    """Refuse a checkpoint whose tensors have other names than those of an architecture.

    Raises:
        ValueError: Lists what is missing and what is left over.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"{verb} {shortened(names)}" for verb, names in (("it lacks", missing), ("it has", extra)) if names]
        raise ValueError(f"This is not a checkpoint of {name}: {' and '.join(parts)}.")


def shape_of(state_dict: Mapping[str, torch.Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """Return the shape of a tensor that must have `ndim` dimensions.

    Raises:
        ValueError: If it has another number of them, or no values.
    """
    shape = tuple(state_dict[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{name} has the shape {shape}; {ndim} dimensions are needed.")
    return shape
