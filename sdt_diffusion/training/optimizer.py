"""AdamW and its learning rate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import nn

from ..utils.ranges import CheckedArguments, at_least, between

#: A schedule of diffusers.optimization that needs more than these arguments.
NOT_OFFERED = SchedulerType.PIECEWISE_CONSTANT


@dataclass(frozen=True)
class OptimizationArguments(CheckedArguments):
    """AdamW as in DiT, which has no gradient clipping."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."} | between(0, 1000))
    lr_scheduler: str = field(default="constant", metadata={"help": "A schedule of diffusers.optimization."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up."} | at_least(0))
    min_lr: float = field(
        default=0.0, metadata={"help": "Learning rate at the end of the schedule."} | between(0, 1000)
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta1."} | between(0, 1, with_most=False))
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta2."} | between(0, 1, with_most=False))
    adam_weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."} | between(0, 1000))
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."} | between(0, 1, with_least=False))
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Clip gradients to this norm; 0 to leave them."} | at_least(0)
    )

    def __post_init__(self):
        super().__post_init__()
        schedules = [each.value for each in SchedulerType if each is not NOT_OFFERED]
        if self.lr_scheduler not in schedules:
            raise ValueError(f"lr_scheduler must be one of {', '.join(schedules)}, not {self.lr_scheduler!r}.")
        if self.min_lr and not self.min_lr <= self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}.")


def build_optimizer(
    model: nn.Module,
    args: OptimizationArguments,
    groups: Sequence[dict[str, Any]] | None = None,
) -> torch.optim.AdamW:
    """Build AdamW, by torch's fused kernels, for the parameters that are trained.

    Args:
        model: The model.
        args: How to optimize.
        groups: Parameters in groups with a `weight_decay` of their own and, as in timm, a factor `lr_scale` of the
            learning rate. By default weight decay excludes parameters of fewer than two dimensions: biases, norms,
            the strength of the spatial decay.
    """
    if groups is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.adam_weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    groups = [{**group, "lr": args.learning_rate * group.get("lr_scale", 1.0)} for group in groups]
    return torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )


def admit_step(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Let the device decide whether the next step is made, so that it need not wait for the host to learn it.

    The fused kernels read where torch's gradient scalers report an overflow, and then leave weights and moments as
    they are. The scaler of fp16 overwrites this by what it has found in the gradients, and lowers its scale.

    Args:
        optimizer: AdamW of `build_optimizer`, without wrappers.
        finite: Whether to make the step, a boolean of shape ().
    """
    optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]


def build_lr_schedule(
    optimizer: torch.optim.Optimizer, args: OptimizationArguments, max_train_steps: int
) -> Callable[[int], None]:
    """Build the schedule of diffusers that the arguments name, ending at `min_lr` where it would end at 0.

    Args:
        optimizer: Its learning rates follow the schedule.
        args: Names the schedule.
        max_train_steps: Length of the schedule.

    Returns:
        Function of the number of steps made that sets the learning rates of the next one. It has no state, so that
        checkpoints need not hold any.
    """
    warmup = args.lr_warmup_steps
    scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=max_train_steps
    )
    factor, floor = scheduler.lr_lambdas[0], args.min_lr / args.learning_rate if args.min_lr else 0.0
    peaks = scheduler.base_lrs

    def set_learning_rates(step: int) -> None:
        scale = factor(step) if step < warmup else floor + (1 - floor) * factor(step)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * scale

    return set_learning_rates
