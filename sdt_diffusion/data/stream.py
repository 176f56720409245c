"""An endless, reshuffled stream of samples that can start anywhere."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset


class ShuffledStream(Dataset):
    """The samples of a data set, epoch after epoch, each in a new order.

    What stands at a position of the stream follows from the seed and the position alone. So a run resumes by starting
    at the position it had reached: no state of a sampler, worker or random generator needs saving, and the number of
    workers changes nothing.

    Args:
        images: Has `__len__` and `__getitems__(indices)`, giving (tensor, label) pairs.
        seed: Seed of the orders and of the mirroring.
        random_flip: Whether to mirror every other image.
        start: First position.
        stop: Position after the last.
    """

    def __init__(self, images, seed: int, random_flip: bool, start: int, stop: int):
        self.images, self.seed, self.random_flip = images, seed, random_flip
        self.start, self.stop = start, stop
        self._orders = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitems__(self, offsets: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        positions = [self.start + offset for offset in offsets]
        indices = [
            int(self._order(position // len(self.images))[position % len(self.images)]) for position in positions
        ]
        samples = self.images.__getitems__(indices)
        if not self.random_flip:
            return samples
        return [
            (image.flip(-1) if self._coin(position) else image, label)
            for position, (image, label) in zip(positions, samples, strict=True)
        ]

    def __getitem__(self, offset: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([offset])[0]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            previous = {epoch - 1: self._orders[epoch - 1]} if epoch - 1 in self._orders else {}
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
            self._orders = {**previous, epoch: order}
        return self._orders[epoch]

    def _coin(self, position: int) -> bool:
        return bool(np.random.default_rng([self.seed, 1, position]).integers(2))
