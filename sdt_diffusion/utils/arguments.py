"""Command lines and YAML files to dataclasses."""

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_origin

import yaml
from transformers import HfArgumentParser


def require_at_least(arguments: Any, least: float, *names: str) -> None:
    """Refuses values that are too small.

    Raises:
        ValueError: Names the first such argument.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} must be at least {least}, not {value}.")


def json_object(text: str | None, flag: str) -> dict[str, Any]:
    """The JSON object that an argument holds; an empty one if the argument is not given.

    Raises:
        ValueError: If it holds something else; names the flag.
    """
    try:
        values = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"{flag} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{flag} must be a JSON object, not {text}.")
    return values


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    recipes: dict[str, Path] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Parses a command line into dataclasses, over values from a YAML file.

    `--config FILE` names the YAML file, a flat mapping of the same keys; the command line wins. Unknown keys and
    flags, and values that do not fit, are errors that name them.

    Args:
        dataclass_types: The dataclasses.
        argv: Command line without the program's name.
        recipes: `--dataset` value -> YAML file that is used when `--config` is not given.
        description: Shown by `--help`.

    Returns:
        An instance of each dataclass.
    """
    parser = _Parser(
        dataclass_types,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file of these arguments.")
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config", type=Path)
    first_look.add_argument("--dataset", default="digits")
    given = first_look.parse_known_args(argv)[0]
    config_file = given.config or (recipes or {}).get(given.dataset)
    known = {f.name: f.type for dataclass_type in dataclass_types for f in dataclasses.fields(dataclass_type)}
    lists = {name for name, kind in known.items() if get_origin(kind) is list}
    values = _read_yaml(parser, config_file, lists) if config_file else {}
    unknown = sorted(set(values) - set(known))
    if unknown:
        parser.error(f"{config_file}: unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    # As flags, values from the file are checked and converted like those of the command line.
    flags = [
        word
        for key, value in values.items()
        for word in ([f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"])
    ]
    try:
        *parsed, _, rest = parser.parse_args_into_dataclasses([*flags, *argv], return_remaining_strings=True)
    except ValueError as error:
        parser.error(str(error))
    if rest:
        parser.error(f"unknown argument(s) {' '.join(rest)}")
    return tuple(parsed)


@contextmanager
def errors_in_a_line(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the program with a line instead of a traceback, for errors that are the user's to mend."""
    try:
        yield
    except kinds as error:
        sys.exit(f"Error: {error}")


def merged(*arguments: Any) -> dict[str, Any]:
    """The values of several argument dataclasses in one flat dictionary."""
    return {key: value for instance in arguments for key, value in dataclasses.asdict(instance).items()}


class _Parser(HfArgumentParser):
    """Keep `resumable`, which is for training, from `argparse`, which gets all other metadata of a field."""

    @staticmethod
    def _parse_dataclass_field(parser, field):
        metadata = {key: value for key, value in field.metadata.items() if key != "resumable"}
        field = copy.copy(field)
        field.metadata = metadata
        HfArgumentParser._parse_dataclass_field(parser, field)


def _read_yaml(parser, path, lists):
    if not path.is_file():
        parser.error(f"--config: there is no file {path}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
        as_written = yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # "no" and 1e-4 as they stand, for argparse
    except yaml.YAMLError as error:
        parser.error(f"{path} is not valid YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"{path} must hold a mapping of argument names to values")
    text = {}
    for key, value in values.items():
        if key in lists and isinstance(value, list):
            text[key] = as_written[key]
        elif value is not None:
            text[str(key)] = json.dumps(value) if isinstance(value, (dict, list)) else as_written[str(key)]
    return text
