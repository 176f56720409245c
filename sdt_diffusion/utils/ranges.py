"""Declare the values that an argument may have beside the argument, and check all of them in one place."""

import dataclasses
import math
import numbers
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

#: Metadata key of the range of a field.
RANGE_KEY = "range"
#: No number that a user means is beyond this, except seeds.
LARGEST = 1e9
LARGEST_SEED = 2**63 - 1


class Range(NamedTuple):
    """Numbers from `least` to `most`.

    Attributes:
        least: The smallest number.
        most: The largest number.
        with_least: Whether `least` itself belongs to the range.
        with_most: Whether `most` itself belongs to the range.
    """

    least: float
    most: float
    with_least: bool = True
    with_most: bool = True

    def has(self, value: float) -> bool:
        """Return whether a number lies in the range; NaN never does."""
        above = self.least <= value if self.with_least else self.least < value
        below = value <= self.most if self.with_most else value < self.most
        return above and below

    def __str__(self) -> str:
        least = f"at least {self.least:.10g}" if self.with_least else f"more than {self.least:.10g}"
        most = f"at most {self.most:.10g}" if self.with_most else f"less than {self.most:.10g}"
        if abs(self.most) >= LARGEST:
            return least if abs(self.least) < LARGEST else "finite"
        return f"{least} and {most}"


def at_least(least: float) -> dict[str, Range]:
    """Return metadata of a field whose value is `least` or more."""
    return {RANGE_KEY: Range(least, LARGEST)}


def more_than(least: float) -> dict[str, Range]:
    """Return metadata of a field whose value is more than `least`."""
    return {RANGE_KEY: Range(least, LARGEST, with_least=False)}


def between(least: float, most: float, with_least: bool = True, with_most: bool = True) -> dict[str, Range]:
    """Return metadata of a field whose value lies between two numbers."""
    return {RANGE_KEY: Range(least, most, with_least, with_most)}


def any_number() -> dict[str, Range]:
    """Return metadata of a field that holds any finite number of a sensible size."""
    return {RANGE_KEY: Range(-LARGEST, LARGEST)}


def a_seed() -> dict[str, Range]:
    """Return metadata of a field that holds a seed."""
    return {RANGE_KEY: Range(0, LARGEST_SEED)}


class CheckedArguments:
    """Base of argument dataclasses that refuses values outside the ranges that their fields declare.

    A subclass with a `__post_init__` of its own calls this one first.
    """

    def __post_init__(self):
        check_fields(self)


def check_fields(arguments: Any) -> None:
    """Compare the values of a dataclass with the types and the ranges of its fields.

    Numbers must be finite, those of `int` fields whole, and those of fields with a range must lie in it. A field of
    `Literal` type must hold one of its values. A list is checked item by item. `None` passes where the type has it.

    Raises:
        ValueError: Names the first field that does not fit, its value, and what is allowed.
    """
    hints = get_type_hints(type(arguments))
    for field in dataclasses.fields(arguments):
        value, kinds = getattr(arguments, field.name), alternatives(hints[field.name])
        if value is None and type(None) in kinds:
            continue
        items = value if isinstance(value, (list, tuple)) else [value]
        for item in items:
            check_value(field.name, item, kinds, field.metadata.get(RANGE_KEY))


def check_value(name: str, value: Any, kinds: tuple[Any, ...], allowed: Range | None = None) -> None:
    """Refuse a value of another type than `kinds`, or outside the range.

    Args:
        name: Name of the argument, for the message.
        value: Its value.
        kinds: Types it may have; other types than numbers and `Literal` are not checked.
        allowed: Its range.

    Raises:
        ValueError: Names the argument, its value, and what is allowed.
    """
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        if value not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(str, choices))}, not {value!r}.")
    elif float in kinds or int in kinds:
        whole = float not in kinds
        fits = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
        if not fits:
            raise ValueError(f"{name} must be a {'whole number' if whole else 'number'}, not {value!r}.")
        check_number(name, value, allowed)


def check_number(name: str, value: float, allowed: Range | None = None) -> None:
    """Refuse a number that is not finite or outside the range.

    Raises:
        ValueError: Names the argument, its value, and what is allowed.
    """
    if not isinstance(value, numbers.Integral) and not math.isfinite(value):  # a whole number may be too large to ask
        raise ValueError(f"{name} must be a finite number, not {value}.")
    if allowed is not None and not allowed.has(value):
        if value > allowed.most >= LARGEST:
            raise ValueError(f"{name} is too large: {value!r:.40}.")
        raise ValueError(f"{name} must be {allowed}, not {value!r:.40}.")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or of a list's items."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in alternatives(part))
    if get_origin(hint) in (list, tuple):
        return tuple(kind for part in get_args(hint) for kind in alternatives(part))
    return (hint,)
