"""AdamW and its learning rate."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from .config import OptimizationArguments


def build_optimizer(
    model: nn.Module,
    args: OptimizationArguments,
    groups: Sequence[dict[str, Any]] | None = None,
    device: torch.device | str = "cpu",
) -> torch.optim.AdamW:
    """AdamW of the parameters that are trained.

    Args:
        model: The model.
        args: How to optimise.
        groups: Parameters in groups with a `weight_decay` of their own and, as timm has it, a factor `lr_scale` of
            the learning rate. By default weight decay spares what has fewer than two dimensions: biases, norms, the
            strength of the decay.
        device: Where it will train; on CUDA its kernels are fused.
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
        fused=True if torch.device(device).type == "cuda" else None,
    )


def build_lr_schedule(
    optimizer: torch.optim.Optimizer, args: OptimizationArguments, max_train_steps: int
) -> Callable[[int], None]:
    """The schedule of diffusers that the arguments name, ending at `min_lr` where it would end at 0.

    Args:
        optimizer: Whose learning rates follow it.
        args: Names the schedule.
        max_train_steps: Its length.

    Returns:
        Function of the steps made before that sets the learning rates of the next: nothing that a checkpoint would
        have to hold.
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
