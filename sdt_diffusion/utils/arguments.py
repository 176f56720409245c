"""Parse command lines and YAML files into dataclasses."""

import argparse
import dataclasses
import difflib
import json
import re
import signal
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_origin

import torch
import yaml
from transformers import HfArgumentParser

from .ranges import RANGE_KEY
from .reading import read_yaml

#: Recipes that come with the package; `--config` takes them by their names.
RECIPES_FOLDER = Path(__file__).parents[1] / "configs"

#: Metadata key of fields, such as tokens, whose values are written nowhere.
SECRET_KEY = "secret"
#: What messages show instead of a secret.
HIDDEN = "(hidden)"
#: Metadata of fields that is not argparse's.
OWN_METADATA = frozenset({"resumable", RANGE_KEY, SECRET_KEY})

#: Ending of the names of fields that hold a JSON object as text. A YAML file may give a mapping for them.
JSON_FIELD_ENDING = "_overrides"

#: How a script's message starts after one of the data loader's processes was killed.
WORKER_ENDED = "Error: a process of the data loader ended, perhaps for lack of memory"


def json_object(text: str | None, name: str) -> dict[str, Any]:
    """Return the JSON object that an argument holds, or an empty one if it is not given.

    Raises:
        ValueError: If it holds something else; names the argument.
    """
    try:
        values = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a JSON object, not {text}.")
    return values


def fields_with(key: str, *arguments: Any) -> set[str]:
    """Return the names of the fields that are marked by `metadata={key: True}`, in dataclasses or their instances."""
    return {field.name for each in arguments for field in dataclasses.fields(each) if field.metadata.get(key)}


def merged(*arguments: Any) -> dict[str, Any]:
    """Return the values of several argument dataclasses, without secrets, in one flat dictionary."""
    secret = fields_with(SECRET_KEY, *arguments)
    values = {key: value for instance in arguments for key, value in dataclasses.asdict(instance).items()}
    return {key: value for key, value in values.items() if key not in secret}


@contextmanager
def exit_on_error() -> Iterator[None]:
    """End the program with one line, instead of a traceback, for what the user can correct, and for Ctrl-C.

    Wrong input, files and disks end it with code 1, as do memory that is too small and a loader's worker that was
    killed; Ctrl-C ends it with code 130. Other errors are bugs and keep their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, (ConnectionError, EOFError)) and _handed_over_a_tensor(error):
            sys.exit(f"{WORKER_ENDED}: {one_line(error)}")
        if isinstance(error, EOFError):
            raise
        sys.exit(f"Error: {one_line(error)}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            sys.exit(f"Error: not enough memory, use smaller batches or images: {one_line(error)}")
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"{WORKER_ENDED}: {one_line(error)}")


def _handed_over_a_tensor(error: BaseException) -> bool:
    """Return whether an error was raised where a process receives a tensor from another one."""
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(file.parts[-3:-1] == ("torch", "multiprocessing") for file in files)


def one_line(error: BaseException) -> str:
    """Return an error's message in one line.

    Of an error that a data loader's worker raised, whose message torch extends by the worker's traceback, it is the
    worker's own message.
    """
    text = str(error)
    if "Original Traceback (most recent call last):" in text:
        lines = text.strip().splitlines()
        start = max(number for number, line in enumerate(lines) if not line.startswith(" "))
        starts = [number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b: ", line)]
        lines = lines[starts[-1] if starts else start :]
        text = " ".join([lines[0].partition(": ")[2] or lines[0], *lines[1:]])
    return at_most(" ".join(text.split())) or type(error).__name__


def at_most(text: str, length: int = 900) -> str:
    """Return a text, without its end if it is longer than one line of a message should be."""
    return text if len(text) <= length else f"{text[:length]} ..."


def parse_arguments(
    dataclass_types: Sequence[Any],
    argv: Sequence[str],
    recipes: dict[str, Path] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Parse a command line into dataclasses, over values from a YAML file.

    `--config` names the YAML file, a flat mapping of the same keys, or a recipe of the package; the command line wins.
    Unknown keys and flags, and values that do not fit, end the program with one line that names them.

    Args:
        dataclass_types: The dataclasses.
        argv: Command line without the program's name.
        recipes: `--dataset` value -> YAML file that is used when `--config` is not given.
        description: Shown by `--help`.

    Returns:
        An instance of each dataclass.
    """
    parser = _Parser(
        dataclass_types, description=description, allow_abbrev=False, formatter_class=_DefaultsHelpFormatter
    )
    parser.hide_secrets(argv, fields_with(SECRET_KEY, *dataclass_types))
    parser.add_argument(
        "--config", help=f"YAML file of these arguments, or the name of a recipe: {', '.join(_recipe_names())}."
    )
    unknown = [word.partition("=")[0] for word in argv if word.startswith("--") and word != "--" and " " not in word]
    # argparse would look for missing required flags first, and not say which flag was mistyped. It has no public list
    # of its flags.
    parser.refuse_unknown("argument(s)", unknown, parser._option_string_actions)
    parser.refuse_dashes(argv)
    first_look = _Parser(None, add_help=False, allow_abbrev=False)
    first_look.add_argument("--config")
    first_look.add_argument("--dataset", default="digits")
    given = first_look.parse_known_args(argv)[0]
    config_file = _find_config(parser, given.config) if given.config else (recipes or {}).get(given.dataset)
    flags = _flags_of(parser, dataclass_types, config_file) if config_file else []
    parser.refuse_dashes(flags)
    try:
        *parsed, _, rest = parser.parse_args_into_dataclasses(
            [*flags, *argv],
            return_remaining_strings=True,
            look_for_args_file=False,  # otherwise a file `<script>.args` beside the script adds flags
        )
    except ValueError as error:
        parser.error(str(error))
    if rest:
        parser.error(f"unexpected argument(s) {' '.join(rest)}")
    return tuple(parsed)


def given_arguments(dataclass_types: Sequence[Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return what a command line that `parse_arguments` takes sets itself, parsed, by the names of the fields.

    Neither defaults nor values of the `--config` file are in it, and no secret is, however its flag was spelled.
    """
    parser = _Parser(dataclass_types, add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    for action in parser._actions:  # argparse has no other way to leave out what is not given
        action.default, action.required = argparse.SUPPRESS, False
    given = vars(parser.parse_args(argv))
    secret = fields_with(SECRET_KEY, *dataclass_types)
    return {name: value for name, value in given.items() if name not in secret}


class _Parser(HfArgumentParser):
    """Reports wrong input in one line, without the usage of all flags, and without secrets."""

    _secret_fields: Collection[str] = ()
    _secrets: Collection[str] = ()

    def hide_secrets(self, argv: Sequence[str], fields: Collection[str]) -> None:
        """Leave the values of secret fields out of all messages, however many words were given for one."""
        self._secret_fields, self._secrets = fields, set()
        hide = False
        for word in argv:
            flag, _, value = word.partition("=")
            if word.startswith("--"):
                hide = flag.removeprefix("--").replace("-", "_") in fields
            if hide:
                self._secrets.add(value if word.startswith("--") else word)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an argument; HfArgumentParser hands over all metadata of a field, argparse knows only its own."""
        return super().add_argument(*names, **{k: v for k, v in settings.items() if k not in OWN_METADATA})

    def error(self, message: str) -> NoReturn:
        """End the program."""
        for secret in self._secrets:
            message = message.replace(secret, HIDDEN) if secret else message
        # By its own class, whose annotation says that it never returns; mypy does not see transformers' parser.
        argparse.ArgumentParser.exit(self, 2, f"{self.prog}: error: {at_most(message)}\n")

    def refuse_dashes(self, words: Sequence[str]) -> None:
        """End the program if a value is `--`, which argparse would take for an empty list."""
        for word in words:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"{word.removesuffix('=--')} cannot be '--'")

    def shown(self, key: str, value: Any) -> Any:
        """Return the value of a field as messages may show it."""
        return HIDDEN if key in self._secret_fields else value

    def refuse_unknown(self, what: str, names: Sequence[str], known: Iterable[str], where: str = "") -> None:
        """End the program if a name is not known, and suggest a similar one."""
        described = []
        for name in dict.fromkeys(names):
            if name not in known:
                similar = difflib.get_close_matches(name, known, n=1)
                described.append(f"{name} (did you mean {similar[0]}?)" if similar else name)
        if described:
            self.error(f"{where}unknown {what} {', '.join(described)}; --help lists all")


class _DefaultsHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one, as one would type it."""

    def _get_help_string(self, action):  # the method that argparse's ArgumentDefaultsHelpFormatter overrides
        if isinstance(action, argparse._StoreFalseAction):  # HfArgumentParser's --no_x, with the help of --x
            return f"Turn off --{action.dest}."
        default = action.default
        if default in (None, "", argparse.SUPPRESS) or default == [] or action.required:
            return action.help
        text = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{action.help} (default: {text.replace('%', '%%')})"


class _TextLoader(yaml.SafeLoader):
    """Reads single values as they are written (`no`, `1e-4`), for argparse to convert; only null is None."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's name and form)
        letter: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in ("null", "merge")]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def _find_config(parser: _Parser, given: str) -> Path:
    """Return the file that `--config` means: a path, or a recipe of the package."""
    if Path(given).is_file():
        return Path(given)
    name = given.removesuffix(".yaml")
    if name not in _recipe_names():
        parser.error(f"--config: there is no file {given}, and the recipes are {', '.join(_recipe_names())}")
    return RECIPES_FOLDER / f"{name}.yaml"


def _flags_of(parser: _Parser, dataclass_types: Sequence[Any], path: Path) -> list[str]:
    """Turn a YAML file into flags, so that its values are checked and converted like those of the command line."""
    try:
        values, typed = read_yaml(path, _TextLoader), read_yaml(path)
    except (OSError, ValueError) as error:
        parser.error(one_line(error))
    fields = {field.name: field for each in dataclass_types for field in dataclasses.fields(each)}
    parser.refuse_unknown("key(s)", [str(key) for key in values], fields, where=f"{path}: ")
    flags = []
    for key, value in values.items():
        takes_list = get_origin(fields[key].type) is list
        if value is None or (value == [] and fields[key].default_factory is list):
            continue
        if isinstance(value, dict) and key.endswith(JSON_FIELD_ENDING):
            flags.append(f"--{key}={_as_json(parser, path, key, typed[key])}")
        elif isinstance(value, (str, int, float)):  # numbers only by explicit tags, such as !!int
            flags.append(f"--{key}={value}")
        elif takes_list and isinstance(value, list) and all(isinstance(item, str) for item in value):
            flags += [f"--{key}", *value]
        else:
            wanted = "a list of single values" if takes_list else "a single value"
            parser.error(f"{path}: {key} must be {wanted}, not {parser.shown(key, typed[key])}")
    return flags


def _as_json(parser: _Parser, path: Path, key: str, value: dict) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        parser.error(f"{path}: {key} cannot be written as JSON: {error}")
