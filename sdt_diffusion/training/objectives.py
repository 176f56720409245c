"""What the model learns to predict: noise or velocity under a DDPM schedule, or the flow from data to noise.

A new objective is a class like those below and a line in `OBJECTIVES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple, Protocol

import torch
from accelerate.utils import reduce
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import SchedulerMixin
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from ..sdt.schedulers import DIT_SCHEDULE
from ..utils.ranges import RANGE_KEY, CheckedArguments, Range, between, check_number, check_value, more_than
from ..utils.seeding import Draws

#: Beyond it the 'mode' distribution would leave 0 to 1 (Esser et al. 2024, section 3.1).
MODE_SCALE = Range(-1, 2 / (math.pi - 2))


@dataclass(frozen=True)
class ObjectiveArguments(CheckedArguments):
    """What the model learns."""

    objective: str = field(default="flow", metadata={"help": "Flow matching (flow) or a DDPM schedule (ddpm)."})
    prediction_type: Literal["epsilon", "v_prediction"] = field(
        default="epsilon", metadata={"help": "What a DDPM model predicts."}
    )
    snr_gamma: float | None = field(
        default=None,
        metadata={"help": "Min-SNR weighting of the DDPM loss (5.0 is usual); none by default."} | more_than(0),
    )
    learn_sigma: bool = field(
        default=False,
        metadata={"help": "Whether a DDPM model also learns the variance of its steps, as DiT's do."},
    )
    weighting_scheme: Literal["logit_normal", "none", "mode"] = field(
        default="logit_normal", metadata={"help": "Distribution of flow times; 'none' is uniform."}
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of logit-normal times."} | between(-100, 100))
    logit_std: float = field(
        default=1.0, metadata={"help": "Standard deviation of logit-normal times."} | between(0, 100, with_least=False)
    )
    mode_scale: float = field(
        default=1.29, metadata={"help": "Scale of the 'mode' distribution of times.", RANGE_KEY: MODE_SCALE}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}.")
        options = {name for objective in OBJECTIVES.values() for name in objective.options}
        for f in fields(self):
            applies = f.name not in options or f.name in OBJECTIVES[self.objective].options
            if not applies and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name} does not apply to objective {self.objective}.")


class Noised(NamedTuple):
    """Training examples: model input, its timestep, what to predict, and the weight of the squared error.

    Where a model predicts more channels than the target has, `further_loss` takes the prediction of the target, shape
    (batch, channels, height, width), without its gradient, and the further channels, and returns their loss, (batch,).
    """

    sample: torch.Tensor
    timestep: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    further_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


class Objective(Protocol):
    """What `DiffusionLoss` needs of an objective, which is built from `ObjectiveArguments`."""

    #: Names of the `ObjectiveArguments` that it reads.
    options: tuple[str, ...]
    #: Timesteps lie between 0 and this number.
    num_train_timesteps: int
    #: Whether the model predicts a variance too, in as many further channels.
    learn_sigma: bool

    def __init__(self, args: ObjectiveArguments): ...

    def sampling_scheduler(self, pixels: bool) -> SchedulerMixin:
        """Return the scheduler that is saved with the pipeline; `pixels` if the model works in pixels."""

    def noised(self, clean: torch.Tensor, draws: Draws) -> Noised:
        """Draw noise and timesteps for a batch of clean (latent) images, shape (batch, channels, height, width)."""


class DDPMObjective:
    """Noise (epsilon) or velocity under DiT's linear schedule."""

    options: tuple[str, ...] = ("prediction_type", "snr_gamma", "learn_sigma")

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


#: Value of `objective` -> class.
OBJECTIVES: dict[str, type[Objective]] = {"flow": FlowObjective, "ddpm": DDPMObjective}


def build_objective(args: ObjectiveArguments) -> Objective:
    """Build the objective that the arguments name."""
    return OBJECTIVES[args.objective](args)


class DiffusionLoss:
    """Weighted mean squared error of a model's prediction on freshly noised batches, in fp32.

    Args:
        objective: What to predict.
        class_dropout_prob: Fraction of the labels that the null class replaces, for classifier-free guidance.
        clean_of: Function of (batch, draws) that gives what the model learns to make, such as
            `TrainingData.clean`; the batch itself by default.
        num_buckets: Ranges of timesteps whose errors are logged.
    """

    def __init__(
        self,
        objective: Objective,
        class_dropout_prob: float = 0.0,
        clean_of: Callable[[torch.Tensor, Draws], torch.Tensor] | None = None,
        num_buckets: int = 10,
    ):
        check_number("class_dropout_prob", class_dropout_prob, Range(0, 1))
        check_value("num_buckets", num_buckets, (int,), Range(1, objective.num_train_timesteps))
        self.objective, self.class_dropout_prob, self.num_buckets = objective, class_dropout_prob, num_buckets
        self.clean_of = clean_of or (lambda batch, draws: batch)
        self._sums = torch.zeros(2, num_buckets)  # of errors, and of images

    def __call__(
        self, model: torch.nn.Module, batch: torch.Tensor, class_labels: torch.Tensor, draws: Draws
    ) -> torch.Tensor:
        """Return the loss of a batch: the weighted error of `errors`, and that of further channels."""
        noised, error, prediction = self._predict(model, batch, class_labels, draws, self.class_dropout_prob)
        self._count(noised.timestep, error.detach())
        loss = (noised.weight * error).mean()
        if noised.further_loss is not None:
            channels = noised.target.shape[1]
            # The variance learns from the bound, and the prediction, as without the variance, from its error.
            loss = loss + noised.further_loss(prediction[:, :channels].detach(), prediction[:, channels:]).mean()
        return loss

    def errors(
        self,
        model: torch.nn.Module,
        batch: torch.Tensor,
        class_labels: torch.Tensor,
        draws: Draws,
        class_dropout_prob: float = 0.0,
    ) -> tuple[Noised, torch.Tensor]:
        """Noise a batch and compare the model's prediction with the target.

        Returns:
            The noised batch, and the mean squared error of each image, shape (batch,), unweighted.

        Raises:
            ValueError: If the model predicts another shape than the target's.
        """
        return self._predict(model, batch, class_labels, draws, class_dropout_prob)[:2]

    def _predict(self, model, batch, class_labels, draws, class_dropout_prob):
        """Return the noised batch, the error of each image, shape (batch,), and the prediction."""
        noised = self.objective.noised(self.clean_of(batch, draws), draws)
        dropped = draws.uniform() < class_dropout_prob
        prediction = model(noised.sample, noised.timestep, class_labels, force_drop_ids=dropped, return_dict=False)[0]
        batch_size, channels, *sides = noised.target.shape
        expected = (batch_size, channels * (1 if noised.further_loss is None else 2), *sides)
        if prediction.shape != expected:
            raise ValueError(
                f"The model predicts {tuple(prediction.shape)}, but the target is {expected}: training needs "
                "out_channels equal to in_channels, or twice that with learn_sigma."
            )
        difference = prediction[:, :channels].float() - noised.target.float()  # (B, C, H, W)
        return noised, difference.square().flatten(1).mean(dim=1), prediction

    def pop_values(self) -> dict[str, float]:
        """Return the mean squared error in each range of timesteps since the last call, over all processes.

        Returns:
            "loss_by_timestep/0000-0099" and so on -> the error; ranges without images are left out.
        """
        errors, images = reduce(self._sums, "sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        edges = [self.objective.num_train_timesteps * i // self.num_buckets for i in range(self.num_buckets + 1)]
        return {
            f"loss_by_timestep/{edges[i]:04d}-{edges[i + 1] - 1:04d}": errors[i] / images[i]
            for i in range(self.num_buckets)
            if images[i]
        }

    def _count(self, timestep, error):
        bucket = (timestep * self.num_buckets / self.objective.num_train_timesteps).long()
        bucket = bucket.clamp(max=self.num_buckets - 1)  # sigma may round up to 1
        self._sums = self._sums.to(error.device)
        finite = error.isfinite()
        self._sums[0].index_add_(0, bucket, error.where(finite, 0))
        self._sums[1].index_add_(0, bucket, finite.float())
