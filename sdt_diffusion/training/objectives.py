"""What the model learns to predict: noise or velocity under a DDPM schedule, or the flow from data to noise."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import SchedulerMixin
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from ..sdt.schedulers import DIT_SCHEDULE
from ..utils.seeding import Draws


@dataclass
class ObjectiveArguments:
    """What the model learns."""

    objective: Literal["ddpm", "flow"] = field(default="flow", metadata={"help": "DDPM schedule or flow matching."})
    prediction_type: Literal["epsilon", "v_prediction"] = field(
        default="epsilon", metadata={"help": "What a DDPM model predicts."}
    )
    snr_gamma: float | None = field(
        default=None, metadata={"help": "Min-SNR weighting of the DDPM loss (5.0 is usual)."}
    )
    weighting_scheme: Literal["logit_normal", "none", "mode"] = field(
        default="logit_normal", metadata={"help": "Distribution of flow times; 'none' is uniform."}
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of logit-normal times."})
    logit_std: float = field(default=1.0, metadata={"help": "Standard deviation of logit-normal times."})
    mode_scale: float = field(default=1.29, metadata={"help": "Scale of the 'mode' distribution of times."})

    def __post_init__(self):
        of_ddpm = ("prediction_type", "snr_gamma")
        of_flow = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")
        for f in fields(self):
            if f.name in (of_ddpm if self.objective == "flow" else of_flow) and getattr(self, f.name) != f.default:
                raise ValueError(f"--{f.name} does not apply to --objective {self.objective}.")


class Noised(NamedTuple):
    """A training example: model input, its timestep, what to predict, and the weight of the squared error."""

    sample: torch.Tensor
    timestep: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


class DDPMObjective:
    """Noise (epsilon) or velocity under DiT's linear schedule."""

    def __init__(self, args: ObjectiveArguments):
        self.prediction_type, self.snr_gamma = args.prediction_type, args.snr_gamma
        self.noise_scheduler = DDPMScheduler(**DIT_SCHEDULE, prediction_type=args.prediction_type)
        self.num_train_timesteps = self.noise_scheduler.config.num_train_timesteps

    def sampling_scheduler(self, pixels: bool) -> SchedulerMixin:
        """The scheduler saved with the pipeline; predictions of pixels are clipped to their range."""
        return DDIMScheduler(
            **DIT_SCHEDULE, prediction_type=self.prediction_type, timestep_spacing="trailing", clip_sample=pixels
        )

    def noised(self, clean: torch.Tensor, draws: Draws) -> Noised:
        """Draws noise and timesteps for a batch."""
        noise = draws.normal(clean.shape[1:])
        timestep = draws.take(
            lambda images, generator: torch.randint(
                self.num_train_timesteps, (images,), generator=generator, device=clean.device
            )
        )
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

    def __init__(self, args: ObjectiveArguments):
        self.args = args
        self.num_train_timesteps = 1000

    def sampling_scheduler(self, pixels: bool) -> SchedulerMixin:
        """The scheduler saved with the pipeline."""
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.num_train_timesteps)

    def noised(self, clean: torch.Tensor, draws: Draws) -> Noised:
        """Draws noise and times for a batch."""
        args = self.args
        noise = draws.normal(clean.shape[1:])
        shape = (args.logit_mean, args.logit_std, args.mode_scale)
        sigma = draws.take(
            lambda images, generator: compute_density_for_timestep_sampling(
                args.weighting_scheme, images, *shape, device=clean.device, generator=generator
            )
        )
        broadcast = sigma.reshape(-1, *[1] * (clean.ndim - 1))
        sample = (1 - broadcast) * clean + broadcast * noise
        return Noised(sample, sigma * self.num_train_timesteps, noise - clean, torch.ones_like(sigma))


def build_objective(args: ObjectiveArguments) -> DDPMObjective | FlowObjective:
    """The objective that the arguments name."""
    return {"ddpm": DDPMObjective, "flow": FlowObjective}[args.objective](args)


class DiffusionLoss:
    """Weighted mean squared error of a model's prediction on freshly noised batches, in fp32.

    Args:
        objective: What to predict.
        class_dropout_prob: Share of the labels that the null class replaces, for classifier-free guidance.
        num_buckets: Ranges of timesteps that `by_timestep` tells apart.
    """

    def __init__(
        self, objective: DDPMObjective | FlowObjective, class_dropout_prob: float = 0.0, num_buckets: int = 10
    ):
        self.objective, self.class_dropout_prob, self.num_buckets = objective, class_dropout_prob, num_buckets
        self._sums = torch.zeros(2, num_buckets)  # of errors, and of images

    def __call__(
        self, model: torch.nn.Module, clean: torch.Tensor, class_labels: torch.Tensor, draws: Draws
    ) -> torch.Tensor:
        """The loss of a batch of clean (latent) images.

        Raises:
            ValueError: If the model predicts another shape than the target's.
        """
        noised = self.objective.noised(clean, draws)
        dropped = draws.uniform() < self.class_dropout_prob
        prediction = model(noised.sample, noised.timestep, class_labels, force_drop_ids=dropped, return_dict=False)[0]
        if prediction.shape != noised.target.shape:
            raise ValueError(
                f"The model predicts {tuple(prediction.shape)}, but the target is {tuple(noised.target.shape)}: "
                "training needs out_channels equal to in_channels."
            )
        error = (prediction.float() - noised.target.float()).square().mean(dim=tuple(range(1, clean.ndim)))
        self._count(noised.timestep, error.detach())
        return (noised.weight * error).mean()

    def by_timestep(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The mean squared error in each range of timesteps, unweighted, since this was last called.

        Args:
            sum_over_processes: Adds a tensor up over all processes.

        Returns:
            "loss_by_timestep/0000-0099" and so on to the error; without ranges that no image fell in.
        """
        errors, images = sum_over_processes(self._sums).tolist()
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
