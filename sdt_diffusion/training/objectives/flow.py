"""The flow from data to noise."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import SchedulerMixin
from diffusers.training_utils import compute_density_for_timestep_sampling

from ...utils.seeding import Draws
from .objective import Noised, ObjectiveArguments


class FlowObjective:
    """Flow matching on x_sigma = (1 - sigma) x + sigma noise: predict noise - x at timestep 1000 sigma."""

    options: tuple[str, ...] = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")
    learn_sigma = False

    def __init__(self, args: ObjectiveArguments):
        self.args = args
        self.num_train_timesteps = 1000

    def sampling_scheduler(self, pixels: bool) -> SchedulerMixin:
        """Return Euler's method."""
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.num_train_timesteps)

    def noised(self, clean: torch.Tensor, draws: Draws) -> Noised:
        """Draw noise and times."""
        args = self.args
        noise = draws.normal(clean.shape[1:])  # (B, C, H, W)
        sigma = draws.take(
            lambda images, generator: compute_density_for_timestep_sampling(
                args.weighting_scheme,
                images,
                args.logit_mean,
                args.logit_std,
                args.mode_scale,
                device=clean.device,
                generator=generator,
            )
        )  # (B,)
        broadcast = sigma.reshape(-1, *[1] * (clean.ndim - 1))  # (B, 1, 1, 1)
        sample = (1 - broadcast) * clean + broadcast * noise
        return Noised(sample, sigma * self.num_train_timesteps, noise - clean, torch.ones_like(sigma))
