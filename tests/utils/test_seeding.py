import torch

from sdt_diffusion.utils.seeding import Draws


def numbers(rows, seed=0, step=0):
    draws = Draws(seed, step, rows, images_per_step=12)
    return draws.normal((2, 3)), draws.uniform(), draws.take(lambda n, g: torch.randint(1000, (n,), generator=g))


def test_parts_of_a_step_are_the_whole_in_pieces():
    whole = numbers(slice(0, 12))
    parts = [numbers(rows) for rows in (slice(0, 4), slice(4, 8), slice(8, 12))]
    for index, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), expected)


def test_seeds_and_steps_have_numbers_of_their_own():
    draws = [numbers(slice(0, 12), seed, step)[0] for seed, step in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    numbers(slice(0, 12))
    assert torch.equal(torch.get_rng_state(), before)
