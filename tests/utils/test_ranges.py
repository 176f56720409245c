import dataclasses
import importlib
import math
import pkgutil
from dataclasses import dataclass, field
from typing import Literal, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdt_diffusion
from sdt_diffusion.utils.arguments import parse_arguments
from sdt_diffusion.utils.ranges import (
    LARGEST,
    RANGE_KEY,
    CheckedArguments,
    Range,
    a_seed,
    alternatives,
    any_number,
    at_least,
    between,
    check_number,
    more_than,
)


@dataclass
class Example(CheckedArguments):
    count: int = field(default=1, metadata=at_least(1))
    rate: float = field(default=0.5, metadata=more_than(0))
    share: float | None = field(default=None, metadata=between(0, 1, with_most=False))
    shift: float = field(default=0.0, metadata=any_number())
    seed: int = field(default=0, metadata=a_seed())
    widths: list[float] = field(default_factory=list, metadata=more_than(0))
    precision: Literal["no", "bf16"] | None = None
    name: str = "x"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count must be at least 1, not 0."),
        ({"count": 1.5}, "count must be a whole number, not 1.5."),
        ({"count": True}, "count must be a whole number, not True."),
        ({"count": "3"}, "count must be a whole number, not '3'."),
        ({"count": None}, "count must be a whole number, not None."),
        ({"count": 10**30}, "count is too large: 1000000000000000000000000000000."),
        ({"count": 10**400}, "count is too large: 1000000000000000000000000000000000000000."),
        ({"rate": 0}, "rate must be more than 0, not 0."),
        ({"rate": math.nan}, "rate must be a finite number, not nan."),
        ({"rate": -math.inf}, "rate must be a finite number, not -inf."),
        ({"rate": 1e30}, r"rate is too large: 1e\+30."),
        ({"share": 1.0}, "share must be at least 0 and less than 1, not 1.0."),
        ({"shift": -1e30}, "shift must be finite, not -1e"),
        ({"seed": -1}, "seed must be at least 0, not -1."),
        ({"seed": 2**63}, "seed is too large"),
        ({"widths": [0.1, 0]}, "widths must be more than 0, not 0."),
        ({"widths": [0.1, "a"]}, "widths must be a number, not 'a'."),
        ({"precision": "fp8"}, "precision must be no or bf16, not 'fp8'."),
    ],
)
def test_values_outside_a_range_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Example(**values)


def test_values_in_range_and_none_where_the_type_has_it_are_accepted():
    Example(3, 1e-30, None, -5.5, 2**63 - 1, [0.05, 1], "bf16")
    Example(share=0)


def test_the_command_line_refuses_what_the_dataclass_refuses(capsys):
    for argv in (["--rate", "nan"], ["--rate=-1"], ["--count", "0"], ["--widths", "0.1", "inf"], ["--seed", "-1"]):
        with pytest.raises(SystemExit) as caught:
            parse_arguments((Example,), argv)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.count("\n") == 1
        assert " must be " in error


@given(st.floats(), st.floats(), st.floats(), st.booleans(), st.booleans())
def test_a_range_has_what_lies_between_its_ends(least, most, value, with_least, with_most):
    expected = (least <= value if with_least else least < value) and (value <= most if with_most else value < most)
    assert Range(least, most, with_least, with_most).has(value) == expected


@given(st.floats() | st.integers())
def test_no_number_passes_that_is_not_finite_or_beyond_all_sense(value):
    if abs(value) <= LARGEST:
        check_number("x", value, any_number()[RANGE_KEY])
    else:
        with pytest.raises(ValueError, match=r"x (must be|is too large)"):
            check_number("x", value, any_number()[RANGE_KEY])


def argument_dataclasses():
    """Return every dataclass of the package whose fields are arguments of scripts, which their help shows."""
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(sdt_diffusion.__path__, "sdt_diffusion.")
        if info.name != "sdt_diffusion.demo.page"  # which has none, and needs an extra
    ]
    classes = {each for module in modules for each in vars(module).values() if dataclasses.is_dataclass(each)}
    own = [each for each in classes if each.__module__.startswith("sdt_diffusion")]
    return {each.__qualname__: each for each in own if any("help" in f.metadata for f in dataclasses.fields(each))}


ARGUMENT_DATACLASSES = argument_dataclasses()


@pytest.mark.parametrize("name", sorted(ARGUMENT_DATACLASSES))
def test_every_argument_that_is_a_number_declares_its_range(name):
    arguments = ARGUMENT_DATACLASSES[name]
    assert issubclass(arguments, CheckedArguments)
    hints = get_type_hints(arguments)
    numbers = [f for f in dataclasses.fields(arguments) if {int, float} & set(alternatives(hints[f.name]))]
    assert [f.name for f in numbers if RANGE_KEY not in f.metadata] == []
