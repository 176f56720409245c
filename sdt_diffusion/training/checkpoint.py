"""Checkpoints that are written completely or not at all, and the folder of a run."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from ..utils.files import sync, valid_json, write_atomically
from ..utils.fingerprint import differences
from ..utils.reading import PlainYamlDumper, checksums, read_json, read_text, read_yaml, shortened
from .monitor import NonFiniteLossError

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"
#: Key of the config file under which changes on resuming are recorded.
CHANGES_KEY = "changes"
#: Files that show a saved pipeline or classifier.
MODEL_FILES = ("model_index.json", "config.json")
#: File of a checkpoint that is written last: its step, its run's config, size and SHA-256 of every file, and the
#: SHA-256 of all this.
MANIFEST_FILE = "checkpoint.json"
MANIFEST_KEYS: dict[str, type] = {"step": int, "config": dict, "state": dict, "files": dict}
MANIFEST_CHECKSUM_KEY = "sha256"
_NAME = re.compile(r"checkpoint-([0-9]+)")


class CheckpointError(OSError):
    """A checkpoint could not be written; the message names the last one that is complete."""


def save_checkpoint(
    output_dir: Path,
    step: int,
    save: Callable[[Path], Any],
    total_limit: int | None = None,
    config: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    is_main_process: bool = True,
    wait_for_everyone: Callable[[], None] = lambda: None,
) -> Path:
    """Write `checkpoint-<step>` under another name, move it into place, then delete the oldest beyond the limit.

    All processes call it; the main one makes, moves and deletes the folders.

    Args:
        output_dir: The run's folder.
        step: Optimizer steps done.
        save: Fills the folder it is given.
        total_limit: Checkpoints to keep, `None` for all.
        config: The run's config, kept in the manifest.
        state: Small values to resume from, kept in the manifest too.
        is_main_process: Whether this process is the main one.
        wait_for_everyone: Barrier of the processes.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: If it cannot be written, for example on a full disk. Nothing is left of it, and no other
            checkpoint is deleted.
        NonFiniteLossError: If `save` finds values that are NaN or infinite, likewise.
    """
    path, partial = output_dir / f"checkpoint-{step}", output_dir / f"checkpoint-{step}.partial"
    if is_main_process:
        for leftover in output_dir.glob("checkpoint-*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
    wait_for_everyone()
    try:
        if is_main_process:
            partial.mkdir(parents=True)
        wait_for_everyone()
        save(partial)
        wait_for_everyone()
        if is_main_process:
            inside = list(partial.rglob("*"))
            files = sorted(path for path in inside if path.is_file())
            entries = {
                file.relative_to(partial).as_posix(): {"size": file.stat().st_size, "sha256": digest}
                for file, digest in zip(files, checksums(files), strict=True)
            }
            text = _manifest_text({"step": step, "config": config or {}, "state": state or {}, "files": entries})
            (partial / MANIFEST_FILE).write_bytes(text.encode())
            for written in (*inside, partial / MANIFEST_FILE, partial):  # of folders, their lists of files
                sync(written)
            if path.exists():  # the run was resumed from an earlier checkpoint
                path.rename(output_dir / f"checkpoint-{step}.old.partial")
            partial.rename(path)
            sync(output_dir)
            shutil.rmtree(output_dir / f"checkpoint-{step}.old.partial", ignore_errors=True)
    except BaseException as error:
        if is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        complete = [other.name for other in complete_checkpoints(output_dir)]
        last = f"{complete[-1]} is complete" if complete else "There is no earlier checkpoint"
        if isinstance(error, NonFiniteLossError):
            raise NonFiniteLossError(f"{path} was not written: {error} {last}.") from error
        if isinstance(error, (OSError, SafetensorError)):
            advice = ": once there is space, continue with resume_from_checkpoint latest" if complete else ""
            raise CheckpointError(f"{path} could not be written: {error}. {last}{advice}.") from error
        raise
    if is_main_process and total_limit is not None:
        # Count complete checkpoints only: later damaged ones must not cause the one just written to be deleted.
        others = [other for other in complete_checkpoints(output_dir) if other != path]
        for old in others[: max(0, len(others) + 1 - max(1, total_limit))]:
            renamed = old.rename(old.with_name(f"{old.name}.partial"))  # a half-deleted checkpoint would look damaged
            shutil.rmtree(renamed, ignore_errors=True)
    wait_for_everyone()
    return path


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoint folders of a run, oldest first, complete or not."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints that have all their files, oldest first; what the files hold is not read."""
    return [path for path in list_checkpoints(output_dir) if is_complete(path)]


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(path.name.removeprefix("checkpoint-"))


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Returns:
        `step`, its run's `config`, `state`, and its `files`: dictionaries of `size` and `sha256` by their names. In
        manifests of earlier versions `sha256` is `None`.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged; names it.
    """
    file = path / MANIFEST_FILE
    text, values = read_text(file), read_json(file)
    has_checksum = values.pop(MANIFEST_CHECKSUM_KEY, None) is not None
    try:
        as_written = _manifest_text(values)
    except RecursionError as error:
        raise ValueError(f"{file} is damaged: its entries are nested too deeply.") from error
    if has_checksum and as_written != text:
        raise ValueError(f"{file} is damaged: its {MANIFEST_CHECKSUM_KEY} does not fit what else it says.")
    # Other keys are refused, for otherwise damage to the checksum's key would turn the checksum off.
    fits = values.keys() == MANIFEST_KEYS.keys() and all(
        isinstance(values[key], kind) for key, kind in MANIFEST_KEYS.items()
    )
    if not fits or values["step"] < 0:
        raise ValueError(f"{file} is damaged: it must hold {', '.join(MANIFEST_KEYS)}, and nothing else.")
    return {**values, "files": {name: _file_entry(file, name, values, has_checksum) for name in values["files"]}}


def _manifest_text(values: dict[str, Any]) -> str:
    """Return the text of a manifest, with the SHA-256 of what it says."""
    values = valid_json(values)
    digest = hashlib.sha256(json.dumps(values, indent=2).encode()).hexdigest()
    return json.dumps({**values, MANIFEST_CHECKSUM_KEY: digest}, indent=2)


def _file_entry(manifest, name, values, has_checksum):
    entry = values["files"][name]
    if not has_checksum:  # as earlier versions wrote it
        entry = {"size": entry, "sha256": None}
    inside = not PurePath(name).is_absolute() and ".." not in PurePath(name).parts
    fits = isinstance(entry, dict) and entry.keys() == {"size", "sha256"} and isinstance(entry["size"], int)
    if not inside or not fits:
        raise ValueError(f"{manifest} is damaged: its entry of the file {name!r} is {entry}.")
    return entry


def is_complete(path: Path) -> bool:
    """Return whether a checkpoint has its manifest and every file in its full size; see `find_damage`."""
    return find_damage(path) is None


def find_damage(path: Path, contents: bool = False) -> str | None:
    """Say what is wrong with the files of a checkpoint.

    Args:
        path: Its folder.
        contents: Whether to compare the SHA-256 of each file, besides its size.

    Returns:
        A text that names the files; `None` for a sound checkpoint.
    """
    try:
        files = read_manifest(path)["files"]
        sizes = {name: (path / name).stat().st_size for name in files if (path / name).is_file()}
        wrong = [name for name, entry in files.items() if sizes.get(name) != entry["size"]]
        if wrong:
            return f"{shortened(wrong)} missing, or not of the full size"
        known = [name for name, entry in files.items() if contents and entry["sha256"] is not None]
        found = checksums([path / name for name in known])
    except FileNotFoundError as error:
        return f"there is no {error.filename}"
    except (OSError, ValueError) as error:
        return str(error).rstrip(".")
    changed = [name for name, digest in zip(known, found, strict=True) if digest != files[name]["sha256"]]
    return f"{shortened(changed)} changed since it was written (another SHA-256)" if changed else None


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """Find the checkpoint to resume from, and read all its files to see whether they are as they were written.

    Args:
        output_dir: The run's folder.
        wanted: "latest", or a path (also relative to `output_dir`).

    Returns:
        Its folder; `None` if `latest` is wanted and there is none. Damaged ones are skipped with a warning.

    Raises:
        ValueError: If a checkpoint asked for by path is missing, incomplete or damaged, or if all are.
    """
    if wanted == "latest":
        found = list_checkpoints(output_dir)
        for path in reversed(found):
            damage = find_damage(path, contents=True)
            if damage is None:
                return path
            logger.warning("Skipping %s: it is incomplete or damaged: %s.", path, damage)
        if found:  # starting again would delete them one by one
            raise ValueError(f"All checkpoints in {output_dir} are damaged: move them away to start again.")
        return None
    path = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
    if not path.is_dir():
        raise ValueError(f"There is no checkpoint {wanted}.")
    damage = find_damage(path, contents=True)
    if damage is not None:
        raise ValueError(
            f"The checkpoint {path} is incomplete or damaged: {damage}. Resume from another one, such as latest."
        )
    return path


def find_shared_checkpoint(output_dir: Path, wanted: str, is_main_process: bool) -> Path | None:
    """Call `find_checkpoint` on the main process, which alone reads the files, and return its answer on all.

    Raises:
        ValueError: On all processes, see `find_checkpoint`.
    """
    answer: list[Any] = [None, None]
    if is_main_process:
        try:
            answer[0] = find_checkpoint(output_dir, wanted)
        except (OSError, ValueError) as error:
            answer[1] = str(error)
    path, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise ValueError(refusal)
    return path


def check_output_dir(
    output_dir: Path,
    config: dict[str, Any],
    resume: bool,
    may_differ: Collection[str] = (),
    changes: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a folder that holds another run, or this one if it is not to be resumed. Write nothing.

    Args:
        output_dir: The run's folder.
        config: The run's arguments.
        resume: Whether the run resumes what the folder holds.
        may_differ: See `check_same_run`.
        changes: See `check_same_run`.
        defaults: See `check_same_run`.

    Raises:
        ValueError: Says what the folder holds, and what to do.
    """
    config_file = output_dir / CONFIG_FILE
    results = list_checkpoints(output_dir) + [
        output_dir / name for name in MODEL_FILES if (output_dir / name).exists()
    ]
    if os.path.lexists(config_file):
        saved = _read_config(config_file)
        saved.pop(CHANGES_KEY, None)
        check_same_run(str(output_dir), saved, config, may_differ, changes, defaults)
        if results and not resume:
            raise ValueError(
                f"{output_dir} already holds this run. Continue it with resume_from_checkpoint latest, or give "
                "another output_dir."
            )
    elif results:
        raise ValueError(f"{output_dir} holds {results[0].name} of something else. Give another output_dir.")


def check_same_run(
    where: str,
    saved: dict[str, Any],
    config: dict[str, Any],
    may_differ: Collection[str] = (),
    changes: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Refuse to mix two runs.

    Args:
        where: What the saved config belongs to.
        saved: Its config.
        config: The config of this run.
        may_differ: Keys that may differ, since they change no step.
        changes: Keys whose change the user has asked for.
        defaults: Values of keys that the saved config lacks, because it was saved before they existed.

    Returns:
        The requested changes that apply: dictionaries of `argument`, `before` and `after`.

    Raises:
        ValueError: Lists the other keys that differ.
    """
    saved = {**{key: value for key, value in (defaults or {}).items() if key in config}, **saved}
    saved, config = ({k: v for k, v in values.items() if k not in may_differ} for values in (saved, config))
    refused = [{k: v for k, v in values.items() if k not in changes} for values in (saved, config)]
    found = differences(*refused)
    if found:
        raise ValueError(
            f"{where} is of a run with another config: {shortened(found, 10, '; ')}. Give another output_dir, or name "
            "the arguments in change_on_resume."
        )
    return [
        {"argument": key, "before": saved.get(key), "after": config.get(key)}
        for key in changes
        if saved.get(key) != config.get(key)
    ]


def write_config(output_dir: Path, config: dict[str, Any], changes: Sequence[dict[str, Any]] = ()) -> None:
    """Mark the folder as this run's, with its arguments and the changes that were made to them on resuming."""
    output_dir.mkdir(parents=True, exist_ok=True)
    values = {**config, **({CHANGES_KEY: list(changes)} if changes else {})}
    text = yaml.dump(values, Dumper=PlainYamlDumper, sort_keys=False)
    write_atomically(output_dir / CONFIG_FILE, lambda path: path.write_text(text))


def read_changes(output_dir: Path) -> list[dict[str, Any]]:
    """Read the changes that `write_config` recorded: `step`, `argument`, `before` and `after` of each.

    Raises:
        ValueError: If the file is damaged; names it.
    """
    path = output_dir / CONFIG_FILE
    changes = _read_config(path).get(CHANGES_KEY, []) if os.path.lexists(path) else []
    if not isinstance(changes, list) or not all(
        isinstance(change, dict) and isinstance(change.get("step"), int) for change in changes
    ):
        raise ValueError(f"{path} is damaged: each of its {CHANGES_KEY} must have a step.")
    return changes


def _read_config(path):
    try:
        return read_yaml(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(error).rstrip('.')}. Restore {path.name}, or give another output_dir.") from error
