"""Random numbers: no two named streams can meet, and nothing else seeds generators."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sdt_diffusion
from sdt_diffusion.utils.seeding import (
    Draws,
    Stream,
    numpy_generator,
    seed_global_generators,
    seed_sequence,
    seeded_cpu_generators,
    torch_generator,
    torch_seed,
)

PACKAGE = Path(sdt_diffusion.__file__).parent

#: Number and first seed of every stream, of seed 0 and key 0. Other numbers here mean other draws in every run.
KNOWN = {
    "EPOCH_ORDER": (1, 4666184472375527826),
    "FLIP": (2, 10538587653167847819),
    "AUGMENTATION": (3, 12316853675961987140),
    "STEP": (4, 5281551905870316796),
    "BATCH": (5, 13763658727323863755),
    "SAMPLE": (6, 17315297923903809940),
    "SAMPLE_LABEL": (7, 917563076836618710),
    "HELD_OUT": (8, 9885886124801112612),
    "NOISED_SAMPLE": (9, 5562837976113229572),
    "INITIALIZATION": (10, 1050069824542033033),
    "HELD_OUT_ROWS": (11, 15955056042715220471),
    "VALIDATION": (12, 3810120275987254610),
    "VELOCITY_NOISE": (20, 13894475116870343464),
    "CLASS_ORDER": (21, 8455632920178689594),
    "CLASS_EPOCH_ORDER": (22, 4317582223094794064),
    "TRAINING_SAMPLES": (23, 14949906036319527067),
}
WITHOUT_KEY = {Stream.INITIALIZATION, Stream.HELD_OUT_ROWS}

streams = st.sampled_from(Stream)
seeds = st.one_of(st.integers(0, 20), st.integers(0, 2**128 - 1), st.integers(0, 127).map(lambda bits: 2**bits))
keys = st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1), st.integers(0, 63).map(lambda bits: 2**bits))
draws = st.tuples(streams, seeds, keys)


def words(stream, seed, *key):
    """All the numbers of a seed sequence's state: those that any generator begins from."""
    return tuple(seed_sequence(stream, seed, *key).generate_state(8).tolist())


@given(first=draws, second=draws)
def test_draws_of_different_names_have_different_seeds(first, second):
    same = first == second
    assert (words(*first) == words(*second)) == same
    assert (torch_seed(*first) == torch_seed(*second)) == same


@given(draw=draws, other=draws)
def test_changing_one_part_of_the_name_changes_the_seed(draw, other):
    for part in range(3):
        changed = (*draw[:part], other[part], *draw[part + 1 :])
        assert (words(*changed) == words(*draw)) == (changed == draw)


@given(stream=streams, seed=seeds, key=st.lists(keys, max_size=3), other=st.lists(keys, max_size=3))
def test_zeros_at_the_end_of_a_key_count(stream, seed, key, other):
    assert (words(stream, seed, *key) == words(stream, seed, *other)) == (key == other)
    assert words(stream, seed, *key) != words(stream, seed, *key, 0)


def test_a_small_grid_of_names_has_no_seed_twice():
    names = [(stream, seed, key) for stream in Stream for seed in range(8) for key in range(64)]
    names += [(stream, seed) for stream in WITHOUT_KEY for seed in range(8)]
    assert len({words(*name) for name in names}) == len({torch_seed(*name) for name in names}) == len(names)


def test_sample_3_and_training_step_0_no_longer_draw_the_same_noise():
    lists = np.random.SeedSequence([0, 3]), np.random.SeedSequence([0, 3, 0])
    assert lists[0].generate_state(4).tolist() == lists[1].generate_state(4).tolist()  # how they met
    sample, step = torch_generator(Stream.SAMPLE, 0, 3), Draws(0, 0, slice(0, 1), images_per_step=1)
    assert not torch.equal(torch.randn(1, 16, generator=sample), step.normal((16,)))
    for seed in range(4):
        samples = {torch_seed(Stream.SAMPLE, seed, index) for index in range(100)}
        assert not samples & {torch_seed(Stream.STEP, seed, index) for index in range(100)}


@pytest.mark.parametrize("large", [2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1])
def test_large_seeds_and_keys_do_not_count_as_small_ones(large):
    low, high = large % 2**32, large >> 32
    assert words(Stream.SAMPLE, large, 0) != words(Stream.SAMPLE, low, 0)
    assert words(Stream.SAMPLE, 0, large) != words(Stream.SAMPLE, 0, low)
    assert words(Stream.SAMPLE, large, 0) != words(Stream.SAMPLE, low, high)
    assert words(Stream.SAMPLE, 0, large) != words(Stream.SAMPLE, 0, low, high)
    assert words(Stream.SAMPLE, 0, large) != words(Stream.SAMPLE, 0, high, low)


def test_the_streams_and_their_numbers_are_those_of_earlier_runs():
    assert {stream.name: int(stream) for stream in Stream} == {name: number for name, (number, _) in KNOWN.items()}
    assert len(Stream.__members__) == len(Stream)  # members of one number would be aliases
    found = {s.name: (int(s), torch_seed(s, 0, *(() if s in WITHOUT_KEY else (0,)))) for s in Stream}
    assert found == KNOWN


def test_generators_and_seeds_come_from_the_same_sequence():
    name = (Stream.SAMPLE, 5, 2)
    assert torch_generator(*name).initial_seed() == torch_seed(*name)
    expected = np.random.default_rng(seed_sequence(*name)).integers(2**32, size=4)
    assert np.array_equal(numpy_generator(*name).integers(2**32, size=4), expected)


def numbers_of_global_generators():
    import random

    return random.random(), np.random.random(), torch.rand(1).item()


def test_global_generators_follow_from_the_name_and_are_restored():
    seed_global_generators(Stream.BATCH, 0, 1)
    first = numbers_of_global_generators()
    with seeded_cpu_generators(Stream.AUGMENTATION, 0, 7):
        inside = numbers_of_global_generators()
    after = numbers_of_global_generators()
    seed_global_generators(Stream.BATCH, 0, 1)
    assert numbers_of_global_generators() == first
    assert numbers_of_global_generators() == after
    with seeded_cpu_generators(Stream.AUGMENTATION, 0, 7):
        assert numbers_of_global_generators() == inside
    with seeded_cpu_generators(Stream.AUGMENTATION, 0, 8):
        assert not set(numbers_of_global_generators()) & set(inside)


SEEDING_CALLS = {"SeedSequence", "default_rng", "RandomState", "manual_seed", "manual_seed_all", "set_seed", "seed"}
#: Start of a module's path -> the calls it may make, and why.
ALLOWED = {
    "utils/seeding.py": (SEEDING_CALLS, "the one place"),
    "metrics/": (
        {"RandomState"},
        "torch-fidelity draws by RandomState(2020), and our numbers must be its own",
    ),
    "data/raw_images.py": ({"RandomState"}, "a fixed subset of images to judge, the same for every run"),
    "sdt/initialization.py": (
        {"manual_seed"},
        "each parameter draws by its name, from one number of the model",
    ),
    "probe.py": ({"manual_seed"}, "the model's config holds noise_seed: saved models must see the same noise"),
}


def test_nothing_else_in_the_package_seeds_generators():
    found = []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        allowed = {call for start, (calls, _) in ALLOWED.items() if name.startswith(start) for call in calls}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", None))
                if called in SEEDING_CALLS - allowed:
                    found.append(f"{name}:{node.lineno} {called}")
    assert not found


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
