"""Random changes of images that follow from the seed and the image's position in the stream, and from nothing else."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomFlip:
    """Mirrors every other image tensor.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def mirrors(self, position: int) -> bool:
        """Whether the image at a position is mirrored."""
        return bool(np.random.default_rng([self.seed, 1, position]).integers(2))

    def __call__(self, image: torch.Tensor, position: int) -> torch.Tensor:
        return image.flip(-1) if self.mirrors(position) else image


class RandomMirror(RandomFlip):
    """Takes, of images that come with their mirrors along the first axis, the one that `RandomFlip` would give."""

    def __call__(self, both: torch.Tensor, position: int) -> torch.Tensor:
        return both[int(self.mirrors(position))]


class SeededTransform:
    """A transform of torchvision's or timm's kind, which draws from the global generators, seeded for every image.

    Args:
        transform: Function of an image.
        seed: Seed of the run.
    """

    def __init__(self, transform: Callable[[Any], torch.Tensor], seed: int):
        self.transform, self.seed = transform, seed

    def __call__(self, image: Any, position: int) -> torch.Tensor:
        with seeded(self.seed, 2, position):
            return self.transform(image)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds the CPU generators of Python, NumPy and torch from a key, and puts back the states they had."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would reach for the accelerators too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
