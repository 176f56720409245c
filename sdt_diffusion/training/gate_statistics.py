"""What the gates of the decay do on held-out images: how fast attention decays, and how strongly they are moved."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..blocks import SDTAttention
from ..utils.seeding import Draws, Stream
from .run import TrainingRun
from .velocity_error import BATCH_SIZE, VelocityError, noise_levels, noise_of, predicted_velocity

#: Noise levels below and above which images count as of low and of high noise.
LOW_NOISE, HIGH_NOISE = 1 / 3, 2 / 3


def gates_of(model: nn.Module) -> dict[int, nn.Module]:
    """Return the gates of a model, by number of their block."""
    attentions = [module for module in model.modules() if isinstance(module, SDTAttention)]
    return {block: attention.gate for block, attention in enumerate(attentions) if attention.gate is not None}


@contextmanager
def recorded_rates(model: nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """Record the rates of the decay, -alpha G, while batches go through a model.

    Yields:
        Block -> rates of the last batch, shape (batch or 1, heads, patches or 1).
    """
    rates: dict[int, torch.Tensor] = {}
    hooks = [gate.register_forward_hook(_recorder(rates, block)) for block, gate in gates_of(model).items()]
    try:
        yield rates
    finally:
        for hook in hooks:
            hook.remove()


class GateStatistics:
    """Rates of the decay, by block and head, and gradients of the gates, on the same images at every step.

    The rate is -alpha G: attention to a patch is multiplied by exp(-rate) for each patch of distance, and so is
    halved after ln(2) / rate of them. The gradient is that of the mean error of the velocity.

    Args:
        velocity_error: Names the images; the first 64 of them are used.
    """

    def __init__(self, velocity_error: VelocityError):
        self.velocity_error = velocity_error

    def __call__(self, run: TrainingRun) -> dict[str, float]:
        """Measure `run.trained_model`; each process measures the same.

        Returns:
            By block and head: `gate_rate/B.H`, its mean over patches and images, `gate_spread/B.H`, its standard
            deviation in units of that, `gate_rate_low_noise/B.H` and `gate_rate_high_noise/B.H`, its mean over images
            of little and of much noise; `gate_gradient/B.NAME`, the norm of a parameter's gradient. Nothing for a
            model without gates.
        """
        gates = gates_of(run.trained_model)
        if not gates:
            return {}
        parameters = [parameter for gate in gates.values() for parameter in gate.parameters()]
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]  # those of an average are
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with recorded_rates(run.trained_model) as rates:
                error, sigma = self._error(run)
            gradients = _gradient_norms(error, gates)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        values: dict[str, float] = {}
        low, high = sigma < LOW_NOISE, sigma > HIGH_NOISE
        for block, rate in rates.items():  # (B or 1, h, N or 1)
            rate = rate.expand(len(sigma), -1, -1).double().cpu()
            for head in range(rate.shape[1]):
                of_head, name = rate[:, head], f"{block}.{head}"  # (B, N)
                mean = of_head.mean().item()
                values[f"gate_rate/{name}"] = mean
                values[f"gate_spread/{name}"] = of_head.std(correction=0).item() / mean if mean else 0.0
                for words, chosen in (("low", low), ("high", high)):
                    if chosen.any():
                        values[f"gate_rate_{words}_noise/{name}"] = of_head[chosen].mean().item()
        return {**values, **gradients}

    def _error(self, run: TrainingRun) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean error of the velocity, and the noise level of each image."""
        measured, accelerator = self.velocity_error, run.accelerator
        count = min(BATCH_SIZE, len(measured.images))
        batch, labels = next(iter(DataLoader(Subset(measured.images, range(count)), batch_size=count)))
        batch, labels = batch.to(accelerator.device), labels.to(accelerator.device)
        draws = Draws(0, 0, slice(0, count), BATCH_SIZE, accelerator.device, Stream.VALIDATION)
        sigma = noise_levels(count, 1)[:, 0]  # (B,)
        with torch.enable_grad(), accelerator.autocast():
            clean = measured.clean_of(batch, draws)  # (B, C, H, W)
            noise = noise_of(range(count), 0, clean)
            velocity = predicted_velocity(run.trained_model, measured.scheduler, clean, noise, sigma, labels)
            return (velocity - (noise - clean).float()).square().mean(), sigma


def _recorder(rates, block):
    def record(module, inputs, output):
        gate, alpha = output  # (B or 1, h, N or 1), (h,)
        rates[block] = -(gate * alpha[:, None]).detach()

    return record


def _gradient_norms(error, gates):
    named = {f"{block}.{name}": p for block, gate in gates.items() for name, p in gate.named_parameters()}
    if not named:
        return {}
    gradients = torch.autograd.grad(error, list(named.values()), allow_unused=True)
    return {
        f"gate_gradient/{name}": 0.0 if gradient is None else gradient.double().norm().item()
        for name, gradient in zip(named, gradients, strict=True)
    }
