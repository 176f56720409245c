"""The axes of a sweep and their values, the cells that they make, and the search for the best value of a number."""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..utils.files import shorten_path
from ..utils.ranges import alternatives
from .fid import FidSamplingArguments

#: Fields of `FidSamplingArguments` that all cells share: others would make numbers that cannot be compared.
NO_AXES = ("num_samples", "samples_dir", "height", "width")
#: Each section of a golden-section search is so much of the last one.
GOLDEN = (5**0.5 - 1) / 2
#: Settings that have no effect without guidance, and those of one kind of guidance.
OF_GUIDANCE = (
    "guidance",
    "guidance_interval",
    "guidance_interval_unit",
    "guidance_rescale",
    "guide_model",
    "decay_guidance_factor",
)
OF_KINDS = {"guide_model": "autoguidance", "decay_guidance_factor": "decay"}


@dataclass(frozen=True)
class Cell:
    """Settings to sample with.

    Args:
        values: Value of each axis, and of the number that is searched for.
        sampling: All settings.
        evaluations: Network evaluations for a sample.
        sampler: The sampler in words.
        weights: Fingerprint of the networks.
    """

    values: dict[str, Any]
    sampling: FidSamplingArguments
    evaluations: int
    sampler: str
    weights: str

    @property
    def name(self) -> str:
        """Name of its files: digits of a hash of its settings."""
        # Defaults do not count, so that fields that later versions add leave the names as they are.
        defaults = {each.name: each.default for each in fields(self.sampling)}
        given = {name: value for name, value in vars(self.sampling).items() if value != defaults[name]}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return describe(self.values) or "the pipeline's settings"


def describe(values: dict[str, Any]) -> str:
    """Return the values of axes in words."""
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


def shown(value: Any) -> str:
    """Return a value as one writes it in `axes`, without what paths tell of the machine."""
    if isinstance(value, (list, tuple)):
        return ":".join(map(shown, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else shorten_path(str(value))


def simplified(sampling: FidSamplingArguments, axes: Collection[str] = ()) -> FidSamplingArguments:
    """Leave out settings that have no effect beside others, so that cells that differ in them alone are one.

    Those of guidance have none at a scale of 1 or less, nor have options of one kind of guidance with another kind, or
    the unit of no interval. Where kind and interval are no axes, such options are mistakes, and stay to be refused.

    Args:
        sampling: All settings.
        axes: Names of those that differ between cells.
    """
    if sampling.guidance_scale is not None and sampling.guidance_scale <= 1:
        return _without(replace(sampling, guidance_scale=1.0), OF_GUIDANCE)
    without = []
    if "guidance" in axes:
        without += [name for name, kind in OF_KINDS.items() if sampling.guidance != kind]
    if "guidance_interval" in axes and sampling.guidance_interval is None:
        without += ["guidance_interval_unit"]
    return _without(sampling, without)


def _without(sampling: FidSamplingArguments, names: Sequence[str]) -> FidSamplingArguments:
    changes: dict[str, Any] = dict.fromkeys(names)
    return replace(sampling, **changes)


def parse_axes(axes: Sequence[str]) -> dict[str, list[Any]]:
    """Read axes such as `guidance_scale=1,1.5` and `guidance_interval=none,0.2:0.8`.

    Raises:
        ValueError: If one is not of this form, no setting of sampling, named twice, or has a value twice.
    """
    found: dict[str, list[Any]] = {}
    for axis in axes:
        name, equals, text = axis.partition("=")
        if not equals or not text:
            raise ValueError(f"axes must be like guidance_scale=1,1.5,2, not {axis!r}.")
        if name in found:
            raise ValueError(f"axes: {name} is there twice.")
        found[name] = [_parse(name, part) for part in text.split(",")]
        for value in found[name]:
            if found[name].count(value) > 1:
                raise ValueError(f"axes: {name} has the value {shown(value)} twice.")
    return found


def _parse(name: str, text: str) -> Any:
    """Convert a text to the type of a setting of sampling; its range is checked where it is set."""
    hints = get_type_hints(FidSamplingArguments)
    if name not in hints or name in NO_AXES:
        known = ", ".join(sorted(set(hints) - set(NO_AXES)))
        raise ValueError(f"axes: {name} is no setting that can differ between cells; those are {known}.")
    kinds = alternatives(hints[name])
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if text in choices:
        return text
    if text == "none" and NoneType in kinds:
        return None
    if choices or not text:
        raise ValueError(f"axes: {name} must be {' or '.join(choices) or 'given'}, not {text!r}.")
    if bool in kinds:
        if text not in ("true", "false"):
            raise ValueError(f"axes: {name} must be true or false, not {text!r}.")
        return text == "true"
    kind = next((kind for kind in (int, float) if kind in kinds), str)
    try:
        values = [kind(part) for part in (text.split(":") if _takes_list(name) else [text])]
    except ValueError:
        raise ValueError(f"axes: {text!r} is no value of {name}.") from None
    return values if _takes_list(name) else values[0]


def _takes_list(name: str) -> bool:
    return any(get_origin(kind) is list for kind in get_args(get_type_hints(FidSamplingArguments)[name]))


def parse_search(search: Sequence[str], axes: dict[str, list[Any]]) -> tuple[str, float, float] | None:
    """Read a search such as `guidance_scale 1 4`.

    Raises:
        ValueError: If it is not of this form, of no number that sampling has, of an axis, or its ends are no interval.
    """
    if not search:
        return None
    hints = get_type_hints(FidSamplingArguments)
    numbers = [name for name in hints if float in alternatives(hints[name]) and not _takes_list(name)]
    if len(search) != 3 or search[0] not in numbers:
        raise ValueError(f"search must be one of {', '.join(numbers)} and two ends, not {' '.join(search)!r}.")
    name, low, high = search[0], *(_parse(search[0], text) for text in search[1:])
    if name in axes:
        raise ValueError(f"search: {name} is one of the axes already.")
    if low is None or high is None or not low < high:
        raise ValueError(f"search: the ends of {name} must be two numbers, the lower one first, not {search[1:]}.")
    return name, low, high


def golden_section(measure: Callable[[float], float], low: float, high: float, evaluations: int) -> float:
    """Find the minimum of a function that falls and then rises between two ends, or is least at one of them.

    Args:
        measure: The function.
        low: Lower end.
        high: Upper end.
        evaluations: Calls of the function between the ends, which are tried first: 2 or more; each but the first two
            divides the interval by 1.618.

    Returns:
        The best argument that was tried.
    """
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    found = {each: measure(each) for each in (low, high, left, right)}
    for _ in range(evaluations - 2):
        if found[left] <= found[right]:
            high, right = right, left
            left = high - GOLDEN * (high - low)
            found[left] = measure(left)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)
            found[right] = measure(right)
    return min(found, key=lambda argument: found[argument])
