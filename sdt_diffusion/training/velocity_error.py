"""Measure how well a model knows the flow's velocity, in one way for all objectives, weightings and schedules.

Images, noise and noise levels are fixed, so that the errors of two models differ by nothing but the models.
"""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from diffusers.schedulers import SchedulerMixin
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..data.splits import ImageSubset
from ..sdt.schedulers import is_flow
from ..utils.seeding import Draws, Stream, torch_generator
from .run import TrainingRun

#: Noise levels sigma between which errors are measured: those that a DDPM schedule of 1,000 steps has too.
LEAST_SIGMA, LARGEST_SIGMA = 0.01, 0.99
#: Noise levels of an image in a full measurement, and ranges of noise levels that it lists.
NUM_LEVELS, NUM_RANGES = 4, 10
#: Images at a time, in training of any batch size: with a VAE, their latents depend on it.
BATCH_SIZE = 64
#: Multiples of the golden ratio, modulo 1, are spread evenly, however many they are.
GOLDEN_RATIO = (5**0.5 - 1) / 2


def noise_levels(num_images: int, num_levels: int) -> torch.Tensor:
    """Return noise levels sigma that are spread evenly, over each image's and over all.

    Those of an image do not depend on how many images there are, and its first one not on `num_levels`.

    Returns:
        Shape (num_images, num_levels), float64.
    """
    images, levels = torch.arange(num_images, dtype=torch.float64), torch.arange(num_levels, dtype=torch.float64)
    position = (0.5 + GOLDEN_RATIO * images[:, None] + levels / num_levels) % 1
    return LEAST_SIGMA + (LARGEST_SIGMA - LEAST_SIGMA) * position


def noise_of(rows: range, level: int, clean: torch.Tensor) -> torch.Tensor:
    """Return the noise of held-out images at one of their noise levels, of the shape and type of `clean`."""
    generators = (torch_generator(Stream.VELOCITY_NOISE, 0, row, level) for row in rows)
    return torch.stack([torch.randn(clean.shape[1:], generator=each) for each in generators]).to(clean)


def predicted_velocity(
    model: nn.Module,
    scheduler: SchedulerMixin,
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    class_labels: torch.Tensor,
) -> torch.Tensor:
    """Return what a model says about the velocity noise - x at (1 - sigma) x + sigma noise.

    A model of a DDPM schedule sees the same mixture, scaled to the schedule's variance, at the timestep of equal
    signal-to-noise ratio, which need not be a whole number. The clean image that it predicts is clipped where its
    sampler clips it.

    Args:
        model: The model, in evaluation mode.
        scheduler: The scheduler that samples from it.
        clean: The images x, shape (batch, channels, height, width).
        noise: The noise, of the same shape.
        sigma: Noise levels above 0 and below 1, shape (batch,), float64.
        class_labels: Shape (batch,).

    Returns:
        The velocity, shape (batch, channels, height, width), in fp32.

    Raises:
        ValueError: If the model predicts something other than velocity or noise.
    """
    weight = sigma.reshape(-1, 1, 1, 1).to(clean)  # (B, 1, 1, 1)
    mixture = (1 - weight) * clean + weight * noise
    channels = clean.shape[1]
    if is_flow(scheduler):
        timestep = (sigma * scheduler.config.num_train_timesteps).to(clean.device, torch.float32)
        return model(mixture, timestep, class_labels, return_dict=False)[0][:, :channels].float()
    length = ((1 - weight) ** 2 + weight**2).sqrt()
    on_clean, on_noise = (1 - weight) / length, weight / length  # their squares add up to 1
    sample = mixture / length
    timestep = timestep_of(scheduler, sigma).to(clean.device)
    prediction = model(sample, timestep, class_labels, return_dict=False)[0][:, :channels].float()
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        predicted = (sample - on_noise * prediction) / on_clean
    elif kind == "v_prediction":
        predicted = on_clean * sample - on_noise * prediction
    else:
        raise ValueError(f"The velocity of a model with prediction_type {kind!r} is not known.")
    if scheduler.config.get("clip_sample"):
        predicted = predicted.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    return (mixture - predicted) / weight


def timestep_of(scheduler: SchedulerMixin, sigma: torch.Tensor) -> torch.Tensor:
    """Return the timesteps at which a DDPM schedule mixes noise and image as sigma / (1 - sigma).

    Between whole timesteps, the logarithm of that ratio is interpolated.

    Args:
        scheduler: Has `alphas_cumprod`.
        sigma: Shape (batch,).

    Returns:
        Shape (batch,), fp32, on the CPU.
    """
    alpha_bar = scheduler.alphas_cumprod.double().cpu().numpy()
    known = 0.5 * np.log((1 - alpha_bar) / alpha_bar)  # rises with the timestep
    wanted = torch.logit(sigma.double()).cpu().numpy()
    return torch.from_numpy(np.interp(wanted, known, np.arange(len(known)))).float()


class VelocityError:
    """Mean squared error of the predicted velocity on held-out images, at noise levels that are spread evenly.

    Args:
        scheduler: The scheduler that samples from the model.
        clean_of: See `DiffusionLoss`.
        images: The held-out images.
        num_images: How many of them, the first ones, `on_the_way` measures.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        clean_of: Callable[[torch.Tensor, Draws], torch.Tensor],
        images: ImageSubset,
        num_images: int,
    ):
        self.scheduler, self.clean_of, self.images, self.num_images = scheduler, clean_of, images, num_images

    def on_the_way(self, run: TrainingRun) -> dict[str, float]:
        """Measure some images at one noise level each; the same ones at every step."""
        return {"velocity_error": self.errors(run, self.num_images, 1).mean().item()}

    def at_the_end(self, run: TrainingRun) -> dict[str, float]:
        """Measure all images at `NUM_LEVELS` noise levels each; the mean, and that of each range of noise levels."""
        errors, sigmas = self.errors(run, len(self.images), NUM_LEVELS), noise_levels(len(self.images), NUM_LEVELS)
        values = {"final_velocity_error": errors.mean().item()}
        for number in range(NUM_RANGES):
            low, high = number / NUM_RANGES, (number + 1) / NUM_RANGES
            inside = (sigmas >= low) & (sigmas < high)
            if inside.any():
                values[f"final_velocity_error/{low:.1f}-{high:.1f}"] = errors[inside].mean().item()
        return values

    def errors(self, run: TrainingRun, num_images: int, num_levels: int) -> torch.Tensor:
        """Return the error of `run.trained_model` for each image and noise level; see `velocity_errors`."""
        measured = (self.scheduler, self.clean_of, self.images, num_images, num_levels)
        return velocity_errors(run.trained_model, *measured, run.accelerator)


@torch.no_grad()
def velocity_errors(
    model: nn.Module,
    scheduler: SchedulerMixin,
    clean_of: Callable[[torch.Tensor, Draws], torch.Tensor],
    images: ImageSubset,
    num_images: int,
    num_levels: int,
    accelerator: Accelerator,
) -> torch.Tensor:
    """Return the error of a model for each image and noise level; the processes share the images.

    Args:
        model: The model, in evaluation mode.
        scheduler: The scheduler that samples from it.
        clean_of: See `DiffusionLoss`.
        images: The images.
        num_images: How many of them to measure, the first ones.
        num_levels: Noise levels of each.
        accelerator: Provides precision, device and processes.

    Returns:
        Shape (num_images, num_levels), float64, on the CPU.
    """
    sigmas = noise_levels(num_images, num_levels)
    errors = torch.zeros_like(sigmas)
    starts = range(0, num_images, BATCH_SIZE)[accelerator.process_index :: accelerator.num_processes]
    for start in starts:
        rows = range(start, min(start + BATCH_SIZE, num_images))
        batch, labels = next(iter(DataLoader(Subset(images, rows), batch_size=len(rows))))  # (B, ...), (B,)
        batch, labels = batch.to(accelerator.device), labels.to(accelerator.device)
        draws = Draws(0, start, slice(0, len(rows)), BATCH_SIZE, accelerator.device, Stream.VALIDATION)
        with accelerator.autocast():
            clean = clean_of(batch, draws)  # (B, C, H, W)
            for level in range(num_levels):
                noise = noise_of(rows, level, clean)
                sigma = sigmas[rows.start : rows.stop, level]
                velocity = predicted_velocity(model, scheduler, clean, noise, sigma, labels)
                error = (velocity - (noise - clean).float()).square().flatten(1).mean(dim=1)  # (B,)
                errors[rows.start : rows.stop, level] = error.double().cpu()
    return reduce(errors.to(accelerator.device), "sum").cpu()
