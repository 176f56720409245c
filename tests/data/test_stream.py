import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sdt_diffusion.data import RandomFlip, SeededTransform, ShuffledStream


class Numbers:
    """Ten "images" that hold their index, left to right increasing."""

    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return [(torch.tensor([[[float(i), i + 0.5]]]), i) for i in indices]


def labels(start, stop, **kwargs):
    stream = ShuffledStream(Numbers(), seed=0, augment=None, start=start, stop=stop, **kwargs)
    return [stream[i][1] for i in range(len(stream))]


def test_every_epoch_is_a_new_permutation():
    stream = labels(0, 30)
    epochs = [stream[0:10], stream[10:20], stream[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_starting_later_gives_the_rest_of_the_same_stream():
    assert labels(17, 40) == labels(0, 40)[17:]


def test_another_seed_gives_another_order():
    other = ShuffledStream(Numbers(), seed=1, augment=None, start=0, stop=10)
    assert [other[i][1] for i in range(10)] != labels(0, 10)


class Imbalanced(Numbers):
    """Six images of class 0, three of class 1, one of class 3, none of class 2."""

    labels = np.array([0, 1, 0, 1, 0, 3, 0, 1, 0, 0])


def balanced(start, stop, seed=0):
    stream = ShuffledStream(Imbalanced(), seed, augment=None, start=start, stop=stop, class_balanced=True)
    return [index for _, index in stream.__getitems__(range(len(stream)))]


def test_balanced_rounds_show_every_class_once_and_its_images_equally_often():
    shown = np.array(balanced(0, 54))  # 18 rounds
    rounds = Imbalanced.labels[shown].reshape(18, 3)
    assert (np.sort(rounds) == [0, 1, 3]).all()
    assert len({tuple(row) for row in rounds}) > 1
    assert np.bincount(shown).tolist() == [3, 6, 3, 6, 3, 18, 3, 6, 3, 3]
    of_class = shown[Imbalanced.labels[shown] == 0].reshape(3, 6)
    assert (np.sort(of_class) == [0, 2, 4, 6, 8, 9]).all()
    assert not (of_class[0] == of_class[1]).all()


def test_a_balanced_stream_follows_from_seed_and_position_alone():
    assert balanced(17, 40) == balanced(0, 40)[17:]
    assert balanced(0, 40, seed=1) != balanced(0, 40)


def test_flips_half_the_images_and_the_same_ones_after_a_restart():
    def flipped(start):
        stream = ShuffledStream(Numbers(), seed=0, augment=RandomFlip(0), start=start, stop=2000)
        return [bool(image[0, 0, 0] > image[0, 0, 1]) for image, _ in stream.__getitems__(range(len(stream)))]

    from_start = flipped(0)
    assert 900 < sum(from_start) < 1100
    assert flipped(1234) == from_start[1234:]


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_change_nothing(workers):
    stream = ShuffledStream(Numbers(), seed=0, augment=RandomFlip(0), start=3, stop=27)
    batches = list(DataLoader(stream, batch_size=4, num_workers=workers))
    assert torch.cat([labels for _, labels in batches]).tolist() == labels(3, 27)
    expected = torch.stack([image for image, _ in stream.__getitems__(range(24))])
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)


def draw(image):
    """One number of every generator that transforms draw from."""
    return torch.tensor([image.item(), random.random(), np.random.rand(), torch.rand(1).item()])


def augmented(start, stop, seed=0, num_repeats=3):
    stream = ShuffledStream(Tens(), 0, SeededTransform(draw, seed), start, stop, num_repeats)
    return [image for image, _ in stream.__getitems__(range(len(stream)))]


class Tens(Numbers):
    def __getitems__(self, indices):
        assert len(set(indices)) == len(indices)  # repeats are read once
        return [(torch.tensor(float(i)), i) for i in indices]


def test_draws_follow_from_seed_and_position_alone():
    torch.manual_seed(0)
    first = augmented(0, 40)
    torch.manual_seed(1)
    assert torch.equal(torch.stack(augmented(0, 40)), torch.stack(first))
    assert torch.equal(torch.stack(augmented(25, 40)), torch.stack(first[25:]))
    other = augmented(0, 40, seed=1)
    assert all((a[1:] != b[1:]).all() for a, b in zip(first, other, strict=True))
    assert len({tuple(image[1:].tolist()) for image in first}) == 40


def test_repeats_stand_in_a_row_each_augmented_anew_and_none_is_left_out():
    images = torch.stack(augmented(0, 30))
    shown = images[:, 0].reshape(10, 3)
    assert (shown == shown[:, :1]).all()
    assert sorted(shown[:, 0].tolist()) == list(range(10))


def test_the_global_generators_are_left_as_they_were():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    augmented(0, 4)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
