import random

import numpy as np
import torch

from sdt_diffusion.data import SeededTransform, ShuffledStream
from tests.data.test_stream import Numbers


def draw(image):
    """One number of every generator that transforms draw from."""
    return torch.tensor([image.item(), random.random(), np.random.rand(), torch.rand(1).item()])


def numbers(start, stop, seed=0, num_repeats=3):
    stream = ShuffledStream(Tens(), 0, SeededTransform(draw, seed), start, stop, num_repeats)
    return [image for image, _ in stream.__getitems__(range(len(stream)))]


class Tens(Numbers):
    def __getitems__(self, indices):
        assert len(set(indices)) == len(indices)  # repeats are read once
        return [(torch.tensor(float(i)), i) for i in indices]


def test_draws_follow_from_seed_and_position_alone():
    torch.manual_seed(0)
    first = numbers(0, 40)
    torch.manual_seed(1)
    assert torch.equal(torch.stack(numbers(0, 40)), torch.stack(first))
    assert torch.equal(torch.stack(numbers(25, 40)), torch.stack(first[25:]))
    other = numbers(0, 40, seed=1)
    assert all((a[1:] != b[1:]).all() for a, b in zip(first, other, strict=True))
    assert len({tuple(image[1:].tolist()) for image in first}) == 40


def test_repeats_stand_in_a_row_each_augmented_anew_and_none_is_left_out():
    images = torch.stack(numbers(0, 30))
    shown = images[:, 0].reshape(10, 3)
    assert (shown == shown[:, :1]).all()
    assert sorted(shown[:, 0].tolist()) == list(range(10))


def test_the_global_generators_are_left_as_they_were():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    numbers(0, 4)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
