"""The flow from data to noise."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import SchedulerMixin
from diffusers.training_utils import compute_density_for_timestep_sampling

from ...utils.seeding import Draws
from .objective import Noised, ObjectiveArguments


class FlowObjective:
    """Flow matching on x_sigma = (1 - sigma) x + sigma noise: predict noise - x at timestep 1000 sigma.

    Raises:
        ValueError: If `time_shift` is 0: see `ObjectiveArguments.resolved`.
    """

    options: tuple[str, ...] = (
        *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "time_shift"),
        *("direction_loss_weight", "contrastive_weight", "self_alignment_weight", "self_alignment_time"),
        *("self_alignment_block", "self_alignment_teacher_block", "routing_ratio", "routing_blocks"),
    )
    sampling: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, args: ObjectiveArguments):
        if not args.time_shift:
            raise ValueError("time_shift 0 depends on the size of images: resolve the arguments by it first.")
        self.args = args
        self.num_train_timesteps = 1000

    def sampling_scheduler(self, pixels: bool) -> SchedulerMixin:
        """Return Euler's method, which shifts its noise levels as training does."""
        return FlowMatchEulerDiscreteScheduler(self.num_train_timesteps, shift=self.args.time_shift)

    def model_config(self, in_channels: int) -> dict[str, Any]:
        """Return nothing: any model will do."""
        return {}

    def times(self, draws: Draws) -> torch.Tensor:
        """Draw sigma, shape (batch,)."""
        args = self.args
        sigma = draws.take(
            lambda images, generator: compute_density_for_timestep_sampling(
                args.weighting_scheme,
                images,
                args.logit_mean,
                args.logit_std,
                args.mode_scale,
                device=draws.device,
                generator=generator,
            )
        )  # (B,)
        return shift_times(sigma, args.time_shift)

    def noised(self, clean: torch.Tensor, draws: Draws) -> Noised:
        """Draw noise and times."""
        noise, sigma = draws.normal(clean.shape[1:]), self.times(draws)  # (B, C, H, W), (B,)
        broadcast = sigma.reshape(-1, *[1] * (clean.ndim - 1))  # (B, 1, 1, 1)
        sample = (1 - broadcast) * clean + broadcast * noise
        return Noised(sample, sigma * self.num_train_timesteps, noise - clean, torch.ones_like(sigma))


def shift_times(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Move flow times toward noise, as more dimensions need (Esser et al. 2024, equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)
