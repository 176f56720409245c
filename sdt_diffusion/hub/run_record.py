"""The record of a run that stays with its model: enough to write the model card, and nothing that is private."""

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from ..utils.files import write_atomically
from ..utils.fingerprint import fingerprint

RECORD_FILE = "training_run.json"

#: Flags that no record may show, and one that says only how often the run was interrupted: resuming is exact.
OMITTED_FLAGS = frozenset({"--hub_token", "--resume_from_checkpoint"})

PACKAGES = ("sdt_diffusion", "torch", "diffusers", "transformers", "accelerate")


def describe_run(
    command: str,
    config: dict[str, Any],
    images: Any,
    networks: Sequence[nn.Module],
    steps: int,
    images_per_step: int,
    num_processes: int,
) -> dict[str, Any]:
    """What there is to say of a run that is over.

    Args:
        command: See `command_of`.
        config: All arguments, as they were resolved; without the Hub's.
        images: The data set, with a `name`, a length and `num_classes`.
        networks: What is saved: the trained network, and others that sampling needs.
        steps: Optimizer steps.
        images_per_step: Images of a step, over all processes.
        num_processes: Number of processes.

    Returns:
        A dictionary for JSON. Paths in it are relative to the working directory or to the home, where they can be.
    """
    return {
        "command": command,
        "config": {key: shorten(value) for key, value in config.items() if f"--{key}" not in OMITTED_FLAGS},
        "data": {
            "name": shorten(images.name),
            "on_hub": _may_be_on_hub(images.name),
            "num_images": len(images),
            "num_classes": images.num_classes,
        },
        "parameters": sum(parameter.numel() for parameter in networks[0].parameters()),
        "weights": fingerprint(*networks),
        "steps": steps,
        "images_per_step": images_per_step,
        "num_processes": num_processes,
        "versions": {package: version(package) for package in PACKAGES},
    }


def command_of(script: str, argv: Sequence[str], num_processes: int) -> str:
    """The command line of a run, as one would type it: no tokens, no flag that only resumes it, no absolute home.

    Args:
        script: The script, such as train/train_dit.py.
        argv: Its arguments.
        num_processes: Number of processes.
    """
    words = ["accelerate", "launch", *(["--num_processes", str(num_processes)] if num_processes > 1 else []), script]
    omit_value = False
    for word in argv:
        flag = word.partition("=")[0]
        if word.startswith("--"):
            omit_value = flag in OMITTED_FLAGS and "=" not in word
        elif omit_value:
            omit_value = False
            continue
        if flag not in OMITTED_FLAGS:
            words.append(word)
    return " ".join(map(_quote, words))


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes the record into the model's folder."""
    write_atomically(folder / RECORD_FILE, lambda path: path.write_text(json.dumps(record, indent=2)))


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the record of a model's folder.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished run of a training script: it has no {RECORD_FILE}.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def as_yaml(config: dict[str, Any]) -> str:
    """The config as a file for `--config`, without what is not set."""
    return yaml.safe_dump({key: value for key, value in config.items() if value is not None}, sort_keys=False)


def shorten(value: Any, home: str = "~/") -> Any:
    """A text without the path of the working directory, and with `home` for that of the home; no text, as it is."""
    if not isinstance(value, str):
        return value
    value = value.replace(f"{Path.cwd()}/", "")
    return value.replace(f"{Path.home()}/", home) if len(Path.home().parts) > 1 else value


def _quote(word):
    before, home, after = shorten(word, "\0").partition("\0")
    if not home:
        return shlex.quote(before)
    return (shlex.quote(before) if before else "") + '"$HOME"/' + shlex.quote(after)  # single quotes would hide it


def _may_be_on_hub(name):
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != "digits" and not Path(name).expanduser().exists()
