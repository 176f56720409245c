"""Measure how local the decay of a trained generator is: how far each head looks, and what pruning saves."""

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset

from ..attention.blockwise import pruned_attention
from ..attention.dispatch import Backend
from ..attention.pruning import tile_densities
from ..attention_processor import SDTAttnProcessor, set_decay_backend
from ..blocks import SDTAttention
from ..training.gate_statistics import gates_of, recorded_rates
from ..training.velocity_error import BATCH_SIZE, noise_of, predicted_velocity, velocity_errors
from .generators import as_they_are, held_out_images, open_generator
from .measures import rounded
from .study import Evaluation

#: Noise levels at which gates are described.
NOISE_LEVELS = tuple((number + 0.5) / 10 for number in range(10))
#: How often each pruned network is timed, in turns with the others.
ROUNDS = 3


@torch.no_grad()
def measure_gates(folder: Path, config: Mapping[str, Any], evaluation: Evaluation, precision: str) -> dict[str, Any]:
    """Measure how fast attention decays, by block, head, noise level and class.

    Args:
        folder: The pipeline.
        config: All arguments of the run that trained it.
        evaluation: Names the number of images, `gate_images`.
        precision: "no" or "bf16", that of training.

    Returns:
        `by_noise`, noise level -> rates, and `by_class`, name -> rates: -alpha G of [block][head], the mean over
        images, patches, and classes or noise levels. Nothing for a model without gates.

    Raises:
        OSError: If the held-out images do not exist.
        ValueError: If the pipeline generates latents, or the images cannot be used.
    """
    accelerator = Accelerator(mixed_precision=precision)
    pipe = open_generator(folder, accelerator.device)
    network = pipe.transformer
    if not gates_of(network):
        return {}
    images = held_out_images(config, network.config.sample_size)
    by_noise, by_class = defaultdict(list), defaultdict(list)
    for start in range(0, min(evaluation.gate_images, len(images)), BATCH_SIZE):
        rows = range(start, min(start + BATCH_SIZE, evaluation.gate_images, len(images)))
        clean, labels = next(iter(DataLoader(Subset(images, rows), batch_size=len(rows))))  # (B, C, H, W), (B,)
        clean, labels = clean.to(accelerator.device), labels.to(accelerator.device)
        noise = noise_of(rows, 0, clean)
        for level in NOISE_LEVELS:
            sigma = torch.full((len(rows),), level, dtype=torch.float64)
            with accelerator.autocast(), recorded_rates(network) as rates:
                predicted_velocity(network, pipe.scheduler, clean, noise, sigma, labels)
            of_heads = [rate.double().mean(-1).expand(len(rows), -1).cpu() for _, rate in sorted(rates.items())]
            for label, rate in zip(labels.tolist(), torch.stack(of_heads, dim=1), strict=True):  # (blocks, heads)
                by_noise[f"{level:.2f}"].append(rate)
                by_class[pipe.id2label[label]].append(rate)
    return {"by_noise": _means(by_noise), "by_class": _means(by_class)}


def measure_pruning(folder: Path, config: Mapping[str, Any], evaluation: Evaluation, precision: str) -> dict[str, Any]:
    """Measure the held-out error and the time of a network that skips parts of its attention.

    All are computed as by the backend `blockwise`, which prunes at any number of tokens here, at one noise level an
    image, and timed in turns.

    Args:
        folder: The pipeline.
        config: All arguments of the run that trained it.
        evaluation: Names the shares of the softmax to skip, `prune_eps`, and the number of images.
        precision: "no" or "bf16", that of training.

    Returns:
        Share, from "0.0" on -> `held_out_loss`, `density`, the share of tiles that was computed, and `relative_time`,
        the ratio of the median times of whole networks. Nothing for a model without gates.

    Raises:
        OSError: If the held-out images do not exist.
        ValueError: If the pipeline generates latents, or the images cannot be used.
    """
    accelerator = Accelerator(mixed_precision=precision)
    pipe = open_generator(folder, accelerator.device)
    if not gates_of(pipe.transformer):
        return {}
    images = held_out_images(config, pipe.transformer.config.sample_size)
    count = min(evaluation.pruning_images, len(images))
    errors, densities, seconds = {}, {}, defaultdict(list)
    for _ in range(ROUNDS):
        for eps in (0.0, *evaluation.prune_eps):
            _prune(pipe.transformer, eps)
            started = time.perf_counter()
            with tile_densities() as found:
                measured = (pipe.scheduler, as_they_are, images, count, 1, accelerator)
                errors[eps] = velocity_errors(pipe.transformer, *measured).mean().item()
            seconds[eps].append(time.perf_counter() - started)
            densities[eps] = torch.stack(found).mean().item() if found else 1.0
    return {
        str(eps): {
            "held_out_loss": rounded(errors[eps]),
            "density": rounded(densities[eps], 4),
            "relative_time": rounded(statistics.median(seconds[eps]) / statistics.median(seconds[0.0]), 4),
        }
        for eps in errors
    }


def _prune(network: torch.nn.Module, eps: float) -> None:
    """Let a network skip a share of each query's softmax, whatever its number of tokens."""
    set_decay_backend(network, "blockwise")
    for module in network.modules():
        if isinstance(module, SDTAttention) and eps:
            processor = SDTAttnProcessor(prune_eps=eps)
            processor.backend = cast(Backend, pruned_attention)  # which needs a decay, and has one here
            module.set_processor(processor)


def _means(rates: Mapping[str, list[torch.Tensor]]) -> dict[str, list[list[float]]]:
    means = {name: torch.stack(found).mean(dim=0).tolist() for name, found in sorted(rates.items())}
    return {name: [[rounded(rate, 4) for rate in heads] for heads in blocks] for name, blocks in means.items()}
