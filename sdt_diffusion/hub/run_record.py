"""Keep the record of a run beside its model: enough to write the model card, and nothing private."""

import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from ..utils.files import local_path, shorten_path, write_json
from ..utils.fingerprint import fingerprint
from ..utils.reading import PlainYamlDumper, read_json

RECORD_FILE = "training_run.json"

#: Arguments that records leave out: resuming does not change the result. Secrets never reach a record, see `merged`.
OMITTED_ARGUMENTS = frozenset({"resume_from_checkpoint"})
#: What every record has, and the type of each.
RECORD_TYPES = {
    **{"command": str, "weights": str},
    **{"config": dict, "data": dict, "versions": dict},
    **{"parameters": int, "steps": int, "images_per_step": int, "num_processes": int},
}
DATA_TYPES = {"name": str, "on_hub": bool, "num_images": int, "num_classes": int}

PACKAGES = ("sdt_diffusion", "torch", "diffusers", "transformers", "accelerate")


def describe_run(
    command: str,
    config: Mapping[str, Any],
    images: Any,
    networks: Sequence[nn.Module],
    steps: int,
    images_per_step: int,
    num_processes: int,
) -> dict[str, Any]:
    """Return the record of a finished run.

    Args:
        command: See `command_of`.
        config: All arguments, as they were resolved; without the Hub's.
        images: The data set, with a `name`, a length and `num_classes`.
        networks: What is saved: the trained network, and others that sampling needs.
        steps: Optimizer steps.
        images_per_step: Images of a step, over all processes.
        num_processes: Number of processes.

    Returns:
        A dictionary for JSON. Paths in it are shortened, see `shorten_path`.
    """
    return {
        "kind": "training_run",
        "command": command,
        "config": {key: shorten_path(value) for key, value in config.items() if key not in OMITTED_ARGUMENTS},
        "data": {
            "name": shorten_path(images.name),
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


def derive_record(source_folder: Path, networks: Sequence[nn.Module], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a model that was made from a finished run without training, such as another average.

    Args:
        source_folder: The folder of the run.
        networks: What is saved, see `describe_run`.
        changes: What is different: `steps` replaces the run's; a `command` is put below the run's; the rest, such as
            `sigma_rel` and `snapshots` of an average, is kept beside the source under `derived`.

    Returns:
        A dictionary for JSON.

    Raises:
        ValueError: If the source folder holds no record, or it is damaged.
    """
    record = read_record(source_folder)
    changes = dict(changes)
    if "command" in changes:
        record["command"] += f"\n{changes.pop('command')}"
    record["steps"] = changes.pop("steps", record["steps"])
    source = {"source": shorten_path(str(source_folder)), "source_weights": record["weights"]}
    return {**record, "weights": fingerprint(*networks), "derived": {**source, **changes}}


def command_of(script: str, given: Mapping[str, Any], num_processes: int | None = None) -> str:
    """Return the command line of a run, ready to be typed, without resuming and private paths.

    Args:
        script: The script, such as train/train_dit.py.
        given: What its command line has set; see `given_arguments`, which leaves out secrets.
        num_processes: Number of processes that accelerate starts; `None` for a script that python starts.
    """
    words = ["python"] if num_processes is None else ["accelerate", "launch"]
    words += ["--num_processes", str(num_processes)] if (num_processes or 1) > 1 else []
    words.append(script)
    for name, value in given.items():
        if name not in OMITTED_ARGUMENTS:
            words += [f"--{name}", *_words_of(value)]
    return " ".join(map(_quote, words))


def _words_of(value: Any) -> list[str]:
    """Return the words that follow a flag on the command line."""
    if value is True:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record into the model's folder."""
    write_json(folder / RECORD_FILE, record)


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a model's folder.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished run of a training script: it has no {RECORD_FILE}.")
    record = read_json(path)
    for where, values, types in (("", record, RECORD_TYPES), ("data.", record.get("data"), DATA_TYPES)):
        for key, kind in types.items():
            if not isinstance(values, dict) or not isinstance(values.get(key), kind):
                found = values.get(key) if isinstance(values, dict) else values
                raise ValueError(f"{path} is damaged: {where}{key} is {found!r:.60}, and must be a {kind.__name__}.")
    return record


def as_yaml(config: Mapping[str, Any]) -> str:
    """Return the config as a file for `--config`, without what is not set."""
    values = {key: value for key, value in config.items() if value is not None}
    return yaml.dump(values, Dumper=PlainYamlDumper, sort_keys=False)


def _quote(word: str) -> str:
    """Quote a word for the shell, with shortened paths."""
    before, home, after = shorten_path(word, "\0").partition("\0")
    if not home:
        return shlex.quote(before)
    # "$HOME" stands outside the single quotes of the rest, which would keep the shell from replacing it.
    return (shlex.quote(before) if before else "") + '"$HOME"/' + (shlex.quote(after) if after else "")


def _may_be_on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != "digits" and not local_path(name).exists()
