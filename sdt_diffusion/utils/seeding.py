"""Seed every random number of the project from a named stream."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch

#: Recorded in checkpoints: a run resumes only with the draws it began with.
SEED_STREAMS_VERSION = 1


class Stream(IntEnum):
    """Names of all uses of random numbers; changing a value changes its draws."""

    EPOCH_ORDER = 1  # key: epoch
    CLASS_ORDER = 21  # key: round; classes of class-balanced batches
    CLASS_EPOCH_ORDER = 22  # key: class label and its epoch; images of class-balanced batches
    FLIP = 2  # key: position in the stream of training images
    AUGMENTATION = 3  # key: position
    STEP = 4  # key: optimizer step; noise, timesteps and dropped labels of `Draws`
    BATCH = 5  # key: position of the batch's first image; dropout, drop path, mixup
    SAMPLE = 6  # key: index of the sample; its initial noise and the noise of its steps
    SAMPLE_LABEL = 7  # key: index of the sample
    HELD_OUT = 8  # key: class label; images kept from training
    NOISED_SAMPLE = 9  # key: index of the sample; noise for decay maps
    INITIALIZATION = 10  # no key; weights of a new model
    TRAINING_SAMPLES = 23  # key: class label; images of a class that a part of a data set holds
    HELD_OUT_ROWS = 11  # no key; images kept from a diffusion model's training
    VALIDATION = 12  # key: index of the first image; noise and timesteps of the held-out loss
    VELOCITY_NOISE = 20  # key: position of the held-out image, number of its noise level


def seed_sequence(stream: Stream, seed: int, *key: int) -> np.random.SeedSequence:
    """Return the seed of one draw: no other stream, seed or key gives the same one.

    NumPy ignores zeros at the end of `SeedSequence([seed, ...])` and splits large integers into several words, so
    that different lists can mean the same seed. A spawn key is mixed in word by word, zeros included, and here each
    integer of the key has two words.

    Args:
        stream: What the numbers are for.
        seed: Seed of the run, 0 to 2^128 - 1.
        *key: Integers that distinguish the draws of a stream, 0 to 2^64 - 1; each stream has a fixed number of them.
    """
    words = [word for number in key for word in (number & 0xFFFFFFFF, number >> 32)]
    return np.random.SeedSequence(seed, spawn_key=(int(stream), *words))


def torch_seed(stream: Stream, seed: int, *key: int) -> int:
    """Return the seed of a torch generator, 0 to 2^64 - 1; see `seed_sequence`."""
    return int(seed_sequence(stream, seed, *key).generate_state(1, np.uint64)[0])


def torch_generator(stream: Stream, seed: int, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator; see `seed_sequence`."""
    return torch.Generator(device).manual_seed(torch_seed(stream, seed, *key))


def numpy_generator(stream: Stream, seed: int, *key: int) -> np.random.Generator:
    """Return a NumPy generator; see `seed_sequence`."""
    return np.random.default_rng(seed_sequence(stream, seed, *key))


def seed_global_generators(stream: Stream, seed: int, *key: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on all devices; see `seed_sequence`."""
    state = torch_seed(stream, seed, *key)
    random.seed(state)
    np.random.seed(state % 2**32)
    torch.manual_seed(state)


@contextmanager
def seeded_cpu_generators(stream: Stream, seed: int, *key: int) -> Iterator[None]:
    """Seed the global CPU generators of Python, NumPy and torch, and restore their states at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = seed_sequence(stream, seed, *key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would initialize the accelerators too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Draws:
    """Draws the random numbers of a batch: its rows of those for all images of the step.

    Every process draws for the whole step, from the same seed, and keeps its own rows. So an image gets the same noise
    whether one process sees the whole step or several see a part each, in one batch or in several. This costs a tensor
    of the whole step's size for a moment: 268 MB for 16,384 latents of 32x32x4.

    Args:
        seed: Seed of the run.
        step: Optimizer steps made before.
        rows: Which of the step's images these are.
        images_per_step: Images of the step, over all processes.
        device: Where the numbers are drawn; another kind of device gives other numbers.
        stream: Stream of the numbers; its key is `step`.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        rows: slice,
        images_per_step: int,
        device: torch.device | str = "cpu",
        stream: Stream = Stream.STEP,
    ):
        self.step, self.rows, self.images_per_step = step, rows, images_per_step
        self.device = torch.device(device)
        self.generator = torch_generator(stream, seed, step, device=self.device)

    def take(self, draw: Callable[[int, torch.Generator], torch.Tensor]) -> torch.Tensor:
        """Return this batch's rows of what `draw` gives for a number of images and a generator."""
        return draw(self.images_per_step, self.generator)[self.rows]

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Draw standard normal numbers, shape (batch, *shape)."""
        return self.take(
            lambda images, generator: torch.randn(images, *shape, generator=generator, device=self.device)
        )

    def uniform(self) -> torch.Tensor:
        """Draw numbers in [0, 1), shape (batch,)."""
        return self.take(lambda images, generator: torch.rand(images, generator=generator, device=self.device))
