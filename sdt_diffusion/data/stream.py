"""An endless, reshuffled stream of samples that can start at any position, and the augmentations of its images."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..utils.ranges import Range, check_value
from ..utils.seeding import Stream, numpy_generator, seeded_cpu_generators, torch_seed

#: No run draws more samples.
MAX_POSITION = 10**15


class RandomFlip:
    """Mirrors half of the image tensors.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def mirrors(self, position: int) -> bool:
        """Return whether the image at a position of the stream is mirrored."""
        return bool(torch_seed(Stream.FLIP, self.seed, position) & 1)

    def __call__(self, image: torch.Tensor, position: int) -> torch.Tensor:
        """Return the image or its mirror image."""
        return image.flip(-1) if self.mirrors(position) else image


class RandomMirror(RandomFlip):
    """Chooses between an image and its mirror image, stacked along the first axis, as `RandomFlip` would."""

    def __call__(self, both: Any, position: int) -> Any:
        """Return the image, `both[0]`, or its mirror image, `both[1]`, of a tensor or of each in a named tuple."""
        side = int(self.mirrors(position))
        return both[side] if isinstance(both, torch.Tensor) else both._make(part[side] for part in both)


class SeededTransform:
    """Seeds a transform of torchvision or timm, which draws from the global generators, for every image.

    Args:
        transform: Function of an image.
        seed: Seed of the run.
    """

    def __init__(self, transform: Callable[[Any], torch.Tensor], seed: int):
        self.transform, self.seed = transform, seed

    def __call__(self, image: Any, position: int) -> torch.Tensor:
        """Return the transformed image."""
        with seeded_cpu_generators(Stream.AUGMENTATION, self.seed, position):
            return self.transform(image)


class EpochOrder:
    """Every image once, then every image once again in another order.

    Args:
        num_images: Images of the data set.
        draw: Function of the number of an epoch that returns the generator of its order.
    """

    def __init__(self, num_images: int, draw: Callable[[int], np.random.Generator]):
        self.num_images, self.draw = num_images, draw
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, slot: int) -> int:
        """Return the index of the image at a place of the stream."""
        epoch, place = divmod(slot, self.num_images)
        if epoch not in self._orders:
            previous = {epoch - 1: self._orders[epoch - 1]} if epoch - 1 in self._orders else {}
            self._orders = {**previous, epoch: self.draw(epoch).permutation(self.num_images)}
        return int(self._orders[epoch][place])


class BalancedOrder:
    """Every class once, in rounds of another order each; the images of a class come in its own `EpochOrder`.

    Args:
        labels: Label of each image; a class without images is left out.
        seed: Seed of the run.
    """

    def __init__(self, labels: Sequence[int] | np.ndarray, seed: int):
        rows = np.argsort(labels, kind="stable")
        present, starts = np.unique(np.asarray(labels)[rows], return_index=True)
        self.rows = np.split(rows, starts[1:])
        self.classes = EpochOrder(len(present), partial(numpy_generator, Stream.CLASS_ORDER, seed))
        self.images = [
            EpochOrder(len(of_class), partial(numpy_generator, Stream.CLASS_EPOCH_ORDER, seed, int(label)))
            for label, of_class in zip(present, self.rows, strict=True)
        ]

    def __call__(self, slot: int) -> int:
        """Return the index of the image at a place of the stream."""
        chosen = self.classes(slot)
        return int(self.rows[chosen][self.images[chosen](slot // len(self.rows))])


class ShuffledStream(Dataset):
    """The samples of a data set, epoch after epoch, each in a new order.

    The sample at a position of the stream depends on the seed and the position alone. So a run resumes by starting at
    the position it had reached: no state of a sampler, worker or random generator is saved, and the number of workers
    changes nothing.

    Args:
        images: Has `__len__` and `__getitems__(indices)`, which returns (image, label) pairs.
        seed: Seed of the orders.
        augment: Function of (image, position) that returns the tensor; `None` to leave images as they are.
        start: First position.
        stop: Position after the last.
        num_repeats: How many times in a row a sample is repeated, augmented anew each time ("Augment your batch",
            Hoffer et al. 2020). An epoch is then that many times longer: no sample is left out, unlike in DeiT's
            sampler, whose epochs stay as long as the data set and so leave samples out.
        class_balanced: Show every class equally often: of as many samples in a row as there are classes, from the
            first on, each has another one. `images` then has `labels` too.
    """

    def __init__(
        self,
        images,
        seed: int,
        augment: Callable[[Any, int], torch.Tensor] | None,
        start: int,
        stop: int,
        num_repeats: int = 1,
        class_balanced: bool = False,
    ):
        check_value("num_repeats", num_repeats, (int,), Range(1, 1000))
        check_value("start", start, (int,), Range(0, MAX_POSITION))
        check_value("stop", stop, (int,), Range(start, MAX_POSITION))
        self.images, self.seed, self.augment = images, seed, augment
        self.start, self.stop, self.num_repeats = start, stop, num_repeats
        self._index: Callable[[int], int] = (
            BalancedOrder(images.labels, seed)
            if class_balanced
            else EpochOrder(len(images), partial(numpy_generator, Stream.EPOCH_ORDER, seed))
        )

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitems__(self, offsets: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        positions = [self.start + offset for offset in offsets]
        indices = [self._index(position // self.num_repeats) for position in positions]
        once = list(dict.fromkeys(indices))  # decode repeated samples once
        samples = dict(zip(once, self.images.__getitems__(once), strict=True))
        if self.augment is None:
            return [samples[index] for index in indices]
        return [
            (self.augment(samples[index][0], position), samples[index][1])
            for position, index in zip(positions, indices, strict=True)
        ]

    def __getitem__(self, offset: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([offset])[0]
