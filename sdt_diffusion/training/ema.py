"""Exponential moving average of the weights, held in a model that is ready for use."""

import copy

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from .arguments import OptimizationArguments


class ModelEMA:
    """A copy of the model whose parameters are diffusers' `EMAModel` average.

    Buffers, which for batch norms are the statistics of activations, are averaged along, as timm does.

    The decay ramps as (1 + step) / (10 + step) up to `ema_decay`; `ema_min_decay=0.9999` makes it DiT's constant.

    Args:
        model: The model to average, not wrapped by accelerate yet.
        args: Holds the decays.
        device: Where the average lives: the model's device in training.
    """

    def __init__(self, model: nn.Module, args: OptimizationArguments, device: torch.device):
        self.model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        self.average = EMAModel([], decay=args.ema_decay, min_decay=args.ema_min_decay, foreach=True)
        self.average.shadow_params = list(self.model.parameters())

    def step(self, model: nn.Module, global_step: int) -> None:
        """Averages in the weights after optimizer step `global_step`, counted from 1."""
        self.average.optimization_step = global_step - 1  # so nothing but the weights needs saving
        self.average.step(model.parameters())
        weight = 1 - self.average.cur_decay_value
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            if buffer.is_floating_point():
                average.lerp_(buffer, weight)
            else:
                average.copy_(buffer)
