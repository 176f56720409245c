import torch
from hypothesis import given
from hypothesis import strategies as st

from sdt_diffusion.attention import manhattan_distance

sides = st.integers(1, 6)


@given(sides, sides)
def test_equals_the_definition_token_by_token(height, width):
    distance = manhattan_distance((height, width))
    for i in range(height * width):
        for j in range(height * width):
            expected = abs(i // width - j // width) + abs(i % width - j % width)
            assert distance[i, j] == expected


def test_keeps_dtype():
    assert manhattan_distance((2, 3), dtype=torch.float64).dtype == torch.float64
