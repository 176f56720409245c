"""Layers that a loss trains with the model, and that are no part of what is saved to sample from.

They are small: every process has the whole of them, under DDP and FSDP2 too. Gradients are averaged before a step.
"""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from .distributed import autocast_forward
from .optimizer import OptimizationArguments

if TYPE_CHECKING:
    from .run import TrainingRun


def prepare_heads(
    heads: nn.ModuleDict, optimizer: torch.optim.Optimizer, args: OptimizationArguments, accelerator: Accelerator
) -> nn.ModuleDict:
    """Move heads to the device and let the model's optimizer train them, without weight decay.

    To be called after the model is prepared: FSDP2 knows no other parameters.
    """
    heads.to(accelerator.device)
    rule = "adamw8bit" if args.optimizer == "adamw8bit" else "adamw"  # Muon is for the blocks
    for head in heads.values():
        autocast_forward(accelerator, head)
    if len(heads):
        settings = {"rule": rule, "num_matrices": 0, "lr": args.learning_rate, "weight_decay": 0.0}
        optimizer.add_param_group({"params": list(heads.parameters()), **settings})
    return heads


def average_gradients(heads: nn.ModuleDict, accelerator: Accelerator) -> None:
    """Average the gradients of heads over all processes, as DDP and FSDP2 do those of the model."""
    for parameter in heads.parameters():
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")


class AverageTeacher:
    """Predict by the average of a run's weights, in the run's precision and without gradients.

    Args:
        run: A run that averages weights.
    """

    def __init__(self, run: "TrainingRun"):
        self.run = run

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged model.

        Raises:
            ValueError: If this process does not have all of the average.
        """
        if self.run.accelerator.is_fsdp2 or not self.run.averages:
            raise ValueError("A loss that asks the average of the weights needs use_ema, and no FSDP2.")
        with self.run.accelerator.autocast():
            return self.run.trained_model(*args, **kwargs)
