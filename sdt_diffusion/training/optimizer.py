"""The optimizer, what it does to which parameter, and its learning rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import nn

from ..utils.ranges import CheckedArguments, at_least, between
from .adamw8bit import build_adamw8bit, initial_8bit_state
from .muon import Muon, muon_matrices
from .parameter_names import check_patterns, decayed_names, matches, parse_factors

#: A schedule of diffusers.optimization that needs more than these arguments.
NOT_OFFERED = SchedulerType.PIECEWISE_CONSTANT


@dataclass(frozen=True)
class OptimizationArguments(CheckedArguments):
    """AdamW as in DiT, which has no gradient clipping, or Muon."""

    optimizer: Literal["adamw", "muon", "adamw8bit"] = field(
        default="adamw",
        metadata={
            "help": "'muon' moves the matrices of the blocks by Muon, and all else by AdamW; 'adamw8bit' is that of "
            "bitsandbytes, with moments of 8 bits."
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."} | between(0, 1000))
    lr_groups: list[str] = field(
        default_factory=list,
        metadata={"help": "Factors of the learning rate of parameters by parts of their names, such as gate=10."},
    )
    lr_scheduler: str = field(default="constant", metadata={"help": "A schedule of diffusers.optimization."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up."} | at_least(0))
    min_lr: float = field(
        default=0.0, metadata={"help": "Learning rate at the end of the schedule."} | between(0, 1000)
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta1."} | between(0, 1, with_most=False))
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta2."} | between(0, 1, with_most=False))
    adam_weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."} | between(0, 1000))
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."} | between(0, 1, with_least=False))
    muon_lr: float | None = field(
        default=None, metadata={"help": "Muon's peak learning rate; AdamW's by default."} | between(0, 1000)
    )
    muon_momentum: float = field(default=0.95, metadata={"help": "Muon's momentum."} | between(0, 1, with_most=False))
    muon_weight_decay: float | None = field(
        default=None, metadata={"help": "Muon's weight decay; AdamW's by default."} | between(0, 1000)
    )
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
        parse_factors(self.lr_groups)
        for name in ("muon_lr", "muon_weight_decay"):
            if self.optimizer != "muon" and getattr(self, name) is not None:
                raise ValueError(f"{name} needs optimizer muon, not {self.optimizer}.")


def build_optimizer(
    model: nn.Module,
    args: OptimizationArguments,
    groups: Sequence[dict[str, Any]] | None = None,
    mixed_precision: str = "no",
) -> torch.optim.Optimizer:
    """Build the optimizer of the parameters that are trained; AdamW is torch's fused one.

    Args:
        model: The model.
        args: How to optimize.
        groups: Parameters in groups with a `weight_decay` of their own and, as in timm, a factor `lr_scale` of the
            learning rate; all that are trained by default. Weight decay pulls on `decayed_names` only.
        mixed_precision: That of the run; Muon computes its matrix products in bf16 unless it is "no".

    Raises:
        ValueError: If an argument does not fit the model, or a package is missing.
    """
    groups = build_groups(model, args, groups)
    adamw: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "muon":
        return Muon(groups, args.muon_momentum, torch.float32 if mixed_precision == "no" else torch.bfloat16, **adamw)
    if args.optimizer == "adamw8bit":
        return build_adamw8bit(groups, **adamw)
    return torch.optim.AdamW(groups, fused=True, **adamw)


def build_groups(
    model: nn.Module, args: OptimizationArguments, groups: Sequence[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Group parameters by all that the optimizer does to them.

    Args:
        model: See `build_optimizer`.
        args: See `build_optimizer`.
        groups: See `build_optimizer`.

    Returns:
        Groups with `params`; `rule`, "adamw", "muon" or "adamw8bit"; `num_matrices`, see `Muon`; `lr`; `weight_decay`.

    Raises:
        ValueError: If a pattern of `lr_groups` matches nothing, or Muon has nothing to move.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = groups or [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    trained = [names[id(parameter)] for group in groups for parameter in group["params"]]
    factors, decayed = parse_factors(args.lr_groups), decayed_names(model)
    check_patterns(factors, trained)
    matrices = muon_matrices(model) if args.optimizer == "muon" else {}
    if args.optimizer == "muon" and not matrices.keys() & set(trained):
        raise ValueError("optimizer muon has nothing to move: no linear layer of a block is trained. Choose adamw.")
    found: dict[tuple, dict[str, Any]] = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            rule = "adamw" if args.optimizer == "muon" and name not in matrices else args.optimizer
            lr, weight_decay = args.learning_rate, group.get("weight_decay", args.adam_weight_decay)
            if rule == "muon":
                lr = lr if args.muon_lr is None else args.muon_lr
                weight_decay = weight_decay if args.muon_weight_decay is None else args.muon_weight_decay
            factor = math.prod(factor for pattern, factor in factors.items() if matches(name, pattern))
            settings = {
                "rule": rule,
                "num_matrices": matrices.get(name, 0),
                "lr": lr * group.get("lr_scale", 1.0) * factor,
                "weight_decay": weight_decay if name in decayed else 0.0,
            }
            found.setdefault(tuple(settings.values()), {"params": [], **settings})["params"].append(parameter)
    return list(found.values())


def initial_state(rule: str, parameter: torch.Tensor) -> dict[str, Any]:
    """Return the optimizer's state of a parameter that it has not moved yet, which its next step may start from."""
    if rule == "muon":
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    if rule == "adamw8bit":
        return initial_8bit_state(parameter)
    moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device), **moments}


def admit_step(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Let the device decide whether the next step is made, so that it need not wait for the host to learn it.

    The fused kernels, and Muon, read where torch's gradient scalers report an overflow, and then leave weights and
    moments as they are. The scaler of fp16 overwrites this by what it has found in the gradients, and lowers its
    scale.

    Args:
        optimizer: That of `build_optimizer`, without wrappers.
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
