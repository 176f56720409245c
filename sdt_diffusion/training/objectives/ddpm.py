"""Noise or velocity under a DDPM schedule, and the variance of its steps."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import SchedulerMixin
from diffusers.training_utils import compute_snr

from ...sdt.schedulers import DIT_SCHEDULE
from ...utils.seeding import Draws
from .objective import Noised, ObjectiveArguments


class DDPMObjective:
    """Noise (epsilon) or velocity under DiT's linear schedule."""

    options: tuple[str, ...] = ("prediction_type", "snr_gamma", "learn_sigma", "routing_ratio", "routing_blocks")
    sampling: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, args: ObjectiveArguments):
        self.prediction_type, self.snr_gamma = args.prediction_type, args.snr_gamma
        self.learn_sigma = args.learn_sigma
        self.noise_scheduler = DDPMScheduler(**DIT_SCHEDULE, prediction_type=args.prediction_type)
        self.num_train_timesteps = self.noise_scheduler.config.num_train_timesteps
        self.posterior_tables = posterior_tables(self.noise_scheduler.alphas_cumprod)

    def sampling_scheduler(self, pixels: bool) -> SchedulerMixin:
        """Return DDIM, or DiT's own sampler after `learn_sigma`; predictions of pixels are clipped to their range."""
        if self.learn_sigma:
            return DDPMScheduler(
                **DIT_SCHEDULE,
                prediction_type=self.prediction_type,
                variance_type="learned_range",
                timestep_spacing="linspace",
                clip_sample=pixels,
            )
        return DDIMScheduler(
            **DIT_SCHEDULE, prediction_type=self.prediction_type, timestep_spacing="trailing", clip_sample=pixels
        )

    def model_config(self, in_channels: int) -> dict[str, Any]:
        """Return twice the channels if the model predicts the variance too."""
        return {"out_channels": 2 * in_channels} if self.learn_sigma else {}

    def noised(self, clean: torch.Tensor, draws: Draws) -> Noised:
        """Draw noise and timesteps: x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) noise."""
        noise = draws.normal(clean.shape[1:])  # (B, C, H, W)
        timestep = draws.take(
            lambda images, generator: torch.randint(
                self.num_train_timesteps, (images,), generator=generator, device=clean.device
            )
        )  # (B,)
        sample = self.noise_scheduler.add_noise(clean, noise, timestep)
        weight = torch.ones(len(clean), device=clean.device)
        if self.snr_gamma is not None:
            snr = compute_snr(self.noise_scheduler, timestep)
            weight = snr.clamp(max=self.snr_gamma) / (snr if self.prediction_type == "epsilon" else snr + 1)
        target = noise
        if self.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(clean, noise, timestep)

        def variance_loss(prediction, variance):
            return self.variational_bound(clean, sample, timestep, prediction, variance)

        return Noised(sample, timestep, target, weight, variance_loss if self.learn_sigma else None)

    def variational_bound(
        self,
        clean: torch.Tensor,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prediction: torch.Tensor,
        variance: torch.Tensor,
    ) -> torch.Tensor:
        """Return the term L_t of the variational bound (improved DDPM, arXiv 2102.09672, section 3.1).

        Args:
            clean: The images x_0, shape (batch, channels, height, width), as all others but the timestep.
            sample: The images x_t.
            timestep: The timesteps t, shape (batch,).
            prediction: What the model predicts of noise or velocity.
            variance: Where, -1 to 1, the logarithm of the variance lies between that of the posterior and that of
                beta (equation 15).

        Returns:
            KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)) for t > 0, and for t = 0 -log p(x_0 | x_1) of images with 256
            values from -1 to 1, in bits per dimension, shape (batch,).
        """
        clean, sample, prediction, variance = (x.float() for x in (clean, sample, prediction, variance))
        rows = self.posterior_tables.to(clean.device)[:, timestep]  # (6, B)
        a, s, on_clean, on_sample, log_beta, log_posterior = rows.reshape(*rows.shape, *[1] * (clean.ndim - 1))
        predicted = (sample - s * prediction) / a if self.prediction_type == "epsilon" else a * sample - s * prediction
        share = (variance + 1) / 2
        log_variance = share * log_beta + (1 - share) * log_posterior
        error = on_clean * (clean - predicted)  # of the mean, to which x_t adds the same in both
        kl = normal_kl(error, log_posterior, log_variance)
        nll = -log_probability_of_pixels(clean, on_clean * predicted + on_sample * sample, log_variance / 2)
        first = timestep.reshape(a.shape) == 0
        return torch.where(first, nll, kl).mean(dim=tuple(range(1, clean.ndim))) / math.log(2)


def posterior_tables(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Return what q(x_t-1 | x_t, x_0) of a schedule needs at each timestep.

    Args:
        alpha_bar: Shape (T,).

    Returns:
        Shape (6, T): sqrt(alpha_bar), sqrt(1 - alpha_bar), the factors of x_0 and of x_t in the mean, log(beta), and
        the logarithm of the variance, at t = 0 that of t = 1, because it is of 0 there.
    """
    alpha_bar = alpha_bar.double().cpu()
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    variance[0] = variance[1]
    on_clean = before.sqrt() * beta / (1 - alpha_bar)
    on_sample = (alpha_bar / before).sqrt() * (1 - before) / (1 - alpha_bar)
    rows = (alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), on_clean, on_sample, beta.log(), variance.log())
    return torch.stack(rows).float()


def normal_kl(difference: torch.Tensor, log_variance: torch.Tensor, other_log_variance: torch.Tensor) -> torch.Tensor:
    """Return KL(N(m, v) || N(m', v')) in nats, of m - m', log v and log v'."""
    ratio = torch.exp(log_variance - other_log_variance)
    return (other_log_variance - log_variance - 1 + ratio + difference.square() * torch.exp(-other_log_variance)) / 2


def log_probability_of_pixels(
    pixels: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, bins: int = 256
) -> torch.Tensor:
    """Return the logarithm of the probability of the bins that pixels lie in, under a normal distribution.

    This is exact; the code of improved DDPM and DiT approximates the distribution by a tanh.

    Args:
        pixels: Values from -1 to 1; the first and the last bin reach to infinity.
        mean: Mean of the distribution, of the same shape.
        log_std: Logarithm of its standard deviation.
        bins: Number of values that pixels may have.
    """
    half = 1 / (bins - 1)
    z_above, z_below = ((pixels + side - mean) * torch.exp(-log_std) for side in (half, -half))
    # log(cdf(b) - cdf(a)) on the side of 0 where the difference is not lost.
    swap = z_below > 0
    low, high = torch.where(swap, -z_above, z_below), torch.where(swap, -z_below, z_above)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    inside = log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-6)))
    edges = torch.where(pixels > 0.999, torch.special.log_ndtr(-z_below), inside)
    return torch.where(pixels < -0.999, torch.special.log_ndtr(z_above), edges)
