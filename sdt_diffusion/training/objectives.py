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
    """Training examples: model input, its timestep, what to predict, and the weight of the squared error."""

    sample: torch.Tensor
    timestep: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


class Objective(Protocol):
    """What `DiffusionLoss` needs of an objective, which is built from `ObjectiveArguments`."""

    #: Names of the `ObjectiveArguments` that it reads.
    options: tuple[str, ...]
    #: Timesteps lie between 0 and this number.
    num_train_timesteps: int

    def __init__(self, args: ObjectiveArguments): ...

    def sampling_scheduler(self, pixels: bool) -> SchedulerMixin:
        """Return the scheduler that is saved with the pipeline; `pixels` if the model works in pixels."""

    def noised(self, clean: torch.Tensor, draws: Draws) -> Noised:
        """Draw noise and timesteps for a batch of clean (latent) images, shape (batch, channels, height, width)."""


class DDPMObjective:
    """Noise (epsilon) or velocity under DiT's linear schedule."""

    options: tuple[str, ...] = ("prediction_type", "snr_gamma")

    def __init__(self, args: ObjectiveArguments):
        self.prediction_type, self.snr_gamma = args.prediction_type, args.snr_gamma
        self.noise_scheduler = DDPMScheduler(**DIT_SCHEDULE, prediction_type=args.prediction_type)
        self.num_train_timesteps = self.noise_scheduler.config.num_train_timesteps

    def sampling_scheduler(self, pixels: bool) -> SchedulerMixin:
        """Return DDIM; predictions of pixels are clipped to their range."""
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
        if self.prediction_type == "epsilon":
            return Noised(sample, timestep, noise, weight)
        return Noised(sample, timestep, self.noise_scheduler.get_velocity(clean, noise, timestep), weight)


class FlowObjective:
    """Flow matching on x_sigma = (1 - sigma) x + sigma noise: predict noise - x at timestep 1000 sigma."""

    options: tuple[str, ...] = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")

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
        """Return the loss of a batch; see `errors`."""
        noised, error = self.errors(model, batch, class_labels, draws, self.class_dropout_prob)
        self._count(noised.timestep, error.detach())
        return (noised.weight * error).mean()

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
        clean = self.clean_of(batch, draws)
        noised = self.objective.noised(clean, draws)
        dropped = draws.uniform() < class_dropout_prob
        prediction = model(noised.sample, noised.timestep, class_labels, force_drop_ids=dropped, return_dict=False)[0]
        if prediction.shape != noised.target.shape:
            raise ValueError(
                f"The model predicts {tuple(prediction.shape)}, but the target is {tuple(noised.target.shape)}: "
                "training needs out_channels equal to in_channels."
            )
        difference = prediction.float() - noised.target.float()  # (B, C, H, W)
        return noised, difference.square().mean(dim=tuple(range(1, clean.ndim)))  # (B,)

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
