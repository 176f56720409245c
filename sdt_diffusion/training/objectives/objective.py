"""What an objective is: how clean images become training examples."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from diffusers.schedulers import SchedulerMixin

from ...utils.ranges import RANGE_KEY, CheckedArguments, Range, at_least, between, more_than
from ...utils.seeding import Draws

#: Beyond it the 'mode' distribution would leave 0 to 1 (Esser et al. 2024, section 3.1).
MODE_SCALE = Range(-1, 2 / (math.pi - 2))

#: Numbers of a latent for which RAE (arXiv 2510.11690, section 4.2) shifts no times.
UNSHIFTED_DIMENSION = 4096
#: Fields that shape an auxiliary loss begin with its name, and apply if its weight is not 0.
AUXILIARY_PREFIXES = ("dispersive", "self_alignment")

#: Value of `objective` -> class; the package's `__init__.py` fills it.
OBJECTIVES: dict[str, type["Objective"]] = {}


@dataclass(frozen=True)
class ObjectiveArguments(CheckedArguments):
    """What the model learns."""

    objective: str = field(
        default="flow",
        metadata={"help": "Flow matching (flow), its average for few steps (meanflow), or a DDPM schedule (ddpm)."},
    )
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
    time_shift: float = field(
        default=1.0,
        metadata={
            "help": "Shift s of flow times toward noise, s sigma / (1 + (s - 1) sigma), in training and sampling; 0 "
            "for sqrt(dimension / 4096)."
        }
        | between(0, 1000),
    )
    meanflow_ratio: float = field(
        default=0.5, metadata={"help": "Share of the images whose interval has no length."} | between(0, 1)
    )
    meanflow_adaptive_power: float = field(
        default=0.0,
        metadata={"help": "Power p of the weight 1 / (error + 0.001)^p of an image; MeanFlow has 1."} | between(0, 2),
    )
    meanflow_guidance_scale: float = field(
        default=1.0, metadata={"help": "Guidance that the averaged flow contains, 1 for none."} | between(1, 1000)
    )
    direction_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the velocity direction loss; 1 is usual."} | at_least(0)
    )
    contrastive_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of contrastive flow matching; 0.05 is usual."} | between(0, 1, with_most=False),
    )
    dispersive_weight: float = field(
        default=0.0, metadata={"help": "Weight of the dispersive loss; 0.5 is usual."} | at_least(0)
    )
    dispersive_block: int | None = field(
        default=None,
        metadata={"help": "Blocks before the tokens that it disperses. Default: a quarter of them."} | at_least(1),
    )
    dispersive_temperature: float = field(
        default=0.5, metadata={"help": "Temperature of the dispersive loss."} | more_than(0)
    )
    dispersive_images: int = field(
        default=32, metadata={"help": "Consecutive images of a batch that are dispersed together."} | at_least(2)
    )
    self_alignment_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the alignment with the average's features; 0.2 is usual."} | at_least(0),
    )
    self_alignment_block: int | None = field(
        default=None, metadata={"help": "Blocks before the aligned tokens. Default: 0.3 of them."} | at_least(1)
    )
    self_alignment_teacher_block: int | None = field(
        default=None,
        metadata={"help": "Blocks before the average's tokens. Default: 0.7 of them."} | at_least(1),
    )
    self_alignment_time: float = field(
        default=0.2,
        metadata={"help": "By how much of the flow's time, at most, the average sees less noise."} | between(0, 1),
    )

    alignment_weight: float = field(
        default=0.5, metadata={"help": "Weight of the alignment with alignment_model, if there is one."} | more_than(0)
    )
    alignment_block: int | None = field(
        default=None,
        metadata={"help": "Blocks before the tokens aligned with it. Default: 0.29 of them, 8 of 28."} | at_least(1),
    )
    alignment_width: int = field(
        default=2048, metadata={"help": "Width of the hidden layers of the alignment's projector."} | at_least(1)
    )
    alignment_stop_step: int | None = field(
        default=None,
        metadata={"help": "Step from which on there is no alignment, which hurts late. Default: none."} | at_least(1),
    )
    routing_ratio: float = field(
        default=0.0,
        metadata={"help": "Share of the tokens that skip the blocks of the route in a step; 0.5 is usual."}
        | between(0, 1, with_most=False),
    )
    routing_blocks: list[int] | None = field(
        default=None,
        metadata={
            "help": "Blocks before those tokens leave, and before they are back. Default: 1/14 and 6/7 of them, 2 and "
            "24 of 28.",
        }
        | at_least(0),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.routing_blocks is not None:
            if not self.routing_ratio:
                raise ValueError("routing_blocks needs routing_ratio.")
            if not isinstance(self.routing_blocks, list) or len(self.routing_blocks) != 2:
                raise ValueError(f"routing_blocks must be two numbers, not {self.routing_blocks}.")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}.")
        options = {name for objective in OBJECTIVES.values() for name in objective.options}
        for f in fields(self):
            applies = f.name not in options or f.name in OBJECTIVES[self.objective].options
            if not applies and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name} does not apply to objective {self.objective}.")
            for prefix in AUXILIARY_PREFIXES:
                idle = f.name.startswith(f"{prefix}_") and not getattr(self, f"{prefix}_weight")
                if idle and getattr(self, f.name) != f.default:
                    raise ValueError(f"{f.name} needs {prefix}_weight.")

    def resolved(self, dimension: int) -> "ObjectiveArguments":
        """Return the arguments with the time shift that 0 stands for.

        Args:
            dimension: Numbers of a (latent) image: channels times height times width.
        """
        if self.time_shift:
            return self
        return replace(self, time_shift=math.sqrt(dimension / UNSHIFTED_DIMENSION))


class Noised(NamedTuple):
    """Training examples: model input, its timestep, what to predict, and the weight of the squared error.

    Where a model predicts more channels than the target has, `further_loss` takes the prediction of the target, shape
    (batch, channels, height, width), without its gradient, and the further channels, and returns their loss, (batch,).

    A MeanFlow has an `end_timestep`, shape (batch,), and in `averaged` the indices of the images where it is earlier.
    """

    sample: torch.Tensor
    timestep: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    further_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    end_timestep: torch.Tensor | None = None
    averaged: torch.Tensor | None = None


class Objective(Protocol):
    """What `DiffusionLoss` needs of an objective, which is built from `ObjectiveArguments`."""

    #: Names of the `ObjectiveArguments` that it reads.
    options: tuple[str, ...]
    #: Timesteps lie between 0 and this number.
    num_train_timesteps: int
    #: Defaults of `guidance_scale` and `num_inference_steps` that differ from those of pipelines.
    sampling: Mapping[str, Any]

    def __init__(self, args: ObjectiveArguments): ...

    def model_config(self, in_channels: int) -> dict[str, Any]:
        """Return the values of the model's config that follow from the objective."""

    def sampling_scheduler(self, pixels: bool) -> SchedulerMixin:
        """Return the scheduler that is saved with the pipeline; `pixels` if the model works in pixels."""

    def noised(self, clean: torch.Tensor, draws: Draws) -> Noised:
        """Draw noise and timesteps for a batch of clean (latent) images, shape (batch, channels, height, width)."""
