"""Measure how far away, in patches, the attention of a trained generator looks, on grids of several sizes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..attention import BACKENDS, manhattan_distance
from ..attention_processor import SDTAttnProcessor
from ..blocks import SDTAttention
from ..training.velocity_error import noise_of, predicted_velocity
from .generators import held_out_images, open_generator
from .measures import rounded
from .study import Evaluation

#: Noise level of the images: at little noise, details are made from neighbors.
NOISE_LEVEL = 0.1
#: Images at a time: distances take memory for each pair of tokens.
BATCH_SIZE = 16


@torch.no_grad()
def measure_attention(
    folder: Path, config: Mapping[str, Any], evaluation: Evaluation, precision: str
) -> dict[str, list[list[float]]]:
    """Measure the mean Manhattan distance of what attention looks at, by block and head, at a noise level of 0.1.

    Args:
        folder: The pipeline. Positions and distances are scaled as it was saved.
        config: All arguments of the run that trained it.
        evaluation: Names the number of images, `attention_images`, and the resolutions besides the trained one.
        precision: "no" or "bf16", that of training.

    Returns:
        Side of the images -> distance in patches of [block][head], the mean over images and patches.

    Raises:
        OSError: If the held-out images do not exist.
        ValueError: If the pipeline generates latents, the images cannot be used, or attention is decomposed.
    """
    accelerator = Accelerator(mixed_precision=precision)
    pipe = open_generator(folder, accelerator.device)
    network = pipe.transformer
    found = {}
    for side in (network.config.sample_size, *evaluation.resolutions):
        images = held_out_images(config, side)
        batches = []
        for start in range(0, min(evaluation.attention_images, len(images)), BATCH_SIZE):
            rows = range(start, min(start + BATCH_SIZE, evaluation.attention_images, len(images)))
            clean, labels = next(iter(DataLoader(Subset(images, rows), batch_size=len(rows))))  # (B, C, H, W), (B,)
            clean, labels = clean.to(accelerator.device), labels.to(accelerator.device)
            sigma = torch.full((len(rows),), NOISE_LEVEL, dtype=torch.float64)
            with accelerator.autocast(), recorded_distances(network) as distances:
                predicted_velocity(network, pipe.scheduler, clean, noise_of(rows, 0, clean), sigma, labels)
            batches.append(torch.stack(distances, dim=1))  # (B, blocks, heads)
        means = torch.cat(batches).double().mean(dim=0).tolist()
        found[str(side)] = [[rounded(mean, 4) for mean in heads] for heads in means]
    return found


@contextmanager
def recorded_distances(network: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Record how far each block looks while a batch goes through a network.

    Yields:
        A list, which the forward pass fills with the mean distance of each image and head, shape (B, h), a block
        after the other. Registers count as at distance 0 and do not look.
    """
    modules = [module for module in network.modules() if isinstance(module, SDTAttention)]
    processors, distances = [module.processor for module in modules], []
    try:
        for module in modules:
            module.set_processor(_DistanceProcessor(distances))
        yield distances
    finally:
        for module, processor in zip(modules, processors, strict=True):
            module.set_processor(processor)


class _DistanceProcessor(SDTAttnProcessor):
    """Attends as usual, and a second time with the distances of all tokens from each as values."""

    def __init__(self, records: list[torch.Tensor]):
        super().__init__()
        self.records, self.backend = records, self._attend

    def __call__(self, attn, hidden_states, grid_size, *args, **kwargs):
        if attn.decomposed:
            raise ValueError("Distances of decomposed attention are not measured.")
        self.registers = attn.num_registers
        distance = manhattan_distance(grid_size, hidden_states.device)  # (N, N)
        self.distance = F.pad(distance, (attn.num_registers, 0, attn.num_registers, 0))  # (R+N, R+N)
        return super().__call__(attn, hidden_states, grid_size, *args, **kwargs)

    def _attend(self, query, key, value, decay, scale):
        values = self.distance.expand(*query.shape[:2], -1, -1)  # (B, h, R+N, R+N)
        seen = BACKENDS["reference"](query.float(), key.float(), values, decay, scale)
        self.records.append(seen.diagonal(dim1=-2, dim2=-1)[..., self.registers :].mean(dim=-1).cpu())
        return BACKENDS["reference"](query, key, value, decay, scale)
