"""Random numbers that do not depend on how many processes share a step."""

from collections.abc import Callable, Sequence

import numpy as np
import torch


class Draws:
    """The random numbers of a batch: its rows of those for all images of the step.

    Every process draws for the whole step, from the same seed, and keeps what is its own. So an image meets the same
    noise whether one process sees the whole step or many see a part each, in one go or in several batches. That costs
    a tensor of the whole step's size for a moment: 268 MB for 16,384 latents of 32x32x4.

    Args:
        seed: Seed of the run.
        step: Optimizer steps made before.
        rows: Which of the step's images these are.
        images_per_step: Images of the step, over all processes.
        device: Where the numbers are drawn; another kind of device gives others.
    """

    def __init__(self, seed: int, step: int, rows: slice, images_per_step: int, device: torch.device | str = "cpu"):
        self.rows, self.images_per_step, self.device = rows, images_per_step, torch.device(device)
        state = int(np.random.SeedSequence([seed, 3, step]).generate_state(1, np.uint64)[0])
        self.generator = torch.Generator(self.device).manual_seed(state)

    def take(self, draw: Callable[[int, torch.Generator], torch.Tensor]) -> torch.Tensor:
        """This batch's rows of what `draw` gives for a number of images and a generator."""
        return draw(self.images_per_step, self.generator)[self.rows]

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal numbers, shape (batch, *shape)."""
        return self.take(
            lambda images, generator: torch.randn(images, *shape, generator=generator, device=self.device)
        )

    def uniform(self) -> torch.Tensor:
        """Numbers in [0, 1), shape (batch,)."""
        return self.take(lambda images, generator: torch.rand(images, generator=generator, device=self.device))
