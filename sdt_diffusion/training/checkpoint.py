"""Checkpoints that are written completely or not at all, and the folder of a run."""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from ..utils.files import sync, write_atomically
from ..utils.fingerprint import differences

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"
#: Key of the config file under which changes on resuming are recorded.
CHANGES_KEY = "changes"
#: Files that show a saved pipeline or classifier.
MODEL_FILES = ("model_index.json", "config.json")
#: File of a checkpoint that is written last: its step, its run's config, and the size of every file.
MANIFEST_FILE = "checkpoint.json"


class CheckpointError(RuntimeError):
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
            files = [path for path in inside if path.is_file()]
            sizes = {str(file.relative_to(partial)): file.stat().st_size for file in files}
            (partial / MANIFEST_FILE).write_text(
                json.dumps({"step": step, "config": config or {}, "state": state or {}, "files": sizes}, indent=2)
            )
            for path_inside in (
                *inside,
                partial / MANIFEST_FILE,
                partial,
            ):  # for a folder, this syncs its list of files
                sync(path_inside)
            if path.exists():  # the run was resumed from an earlier checkpoint
                path.rename(output_dir / f"checkpoint-{step}.old.partial")
            partial.rename(path)
            sync(output_dir)
            shutil.rmtree(output_dir / f"checkpoint-{step}.old.partial", ignore_errors=True)
    except BaseException as error:
        if is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(f"{path} could not be written: {error}. {_last_complete(output_dir)}") from error
        raise
    if is_main_process and total_limit is not None:
        # Count complete checkpoints only: later damaged ones must not cause the one just written to be deleted.
        others = [other for other in complete_checkpoints(output_dir) if other != path]
        for old in others[: max(0, len(others) + 1 - max(1, total_limit))]:
            renamed = old.rename(old.with_name(f"{old.name}.partial"))  # a half-deleted checkpoint would look damaged
            shutil.rmtree(renamed, ignore_errors=True)
    wait_for_everyone()
    return path


def _last_complete(output_dir):
    complete = [path.name for path in complete_checkpoints(output_dir)]
    if not complete:
        return "There is no earlier checkpoint."
    return f"{complete[-1]} is complete: once there is space, continue with resume_from_checkpoint latest."


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoint folders of a run, oldest first, complete or not."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=step_of)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """List the checkpoints that a run can resume from, oldest first."""
    return [path for path in list_checkpoints(output_dir) if is_complete(path)]


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(path.name.removeprefix("checkpoint-"))


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest: `step`, its run's `config`, `state`, and the size of its `files`."""
    return json.loads((path / MANIFEST_FILE).read_text())


def is_complete(path: Path) -> bool:
    """Return whether a checkpoint has its manifest and every file in its full size."""
    try:
        sizes = read_manifest(path)["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        output_dir: The run's folder.
        wanted: "latest", or a path (also relative to `output_dir`).

    Returns:
        Its folder; `None` if `latest` is wanted and there is none. Incomplete ones are skipped with a warning.

    Raises:
        ValueError: If a checkpoint asked for by path is missing or incomplete.
    """
    if wanted == "latest":
        for path in reversed(list_checkpoints(output_dir)):
            if is_complete(path):
                return path
            logger.warning("Skipping %s: it is incomplete.", path)
        return None
    path = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
    if not path.is_dir():
        raise ValueError(f"There is no checkpoint {wanted}.")
    if not is_complete(path):
        raise ValueError(f"The checkpoint {path} is incomplete: files are missing or cut short.")
    return path


def check_output_dir(
    output_dir: Path,
    config: dict[str, Any],
    resume: bool,
    may_differ: Collection[str] = (),
    changes: Collection[str] = (),
) -> None:
    """Refuse a folder that holds another run, or this one if it is not to be resumed. Write nothing.

    Args:
        output_dir: The run's folder.
        config: The run's arguments.
        resume: Whether the run resumes what the folder holds.
        may_differ: See `check_same_run`.
        changes: See `check_same_run`.

    Raises:
        ValueError: Says what the folder holds, and what to do.
    """
    config_file = output_dir / CONFIG_FILE
    results = list_checkpoints(output_dir) + [
        output_dir / name for name in MODEL_FILES if (output_dir / name).exists()
    ]
    if config_file.is_file():
        saved = yaml.safe_load(config_file.read_text()) or {}
        saved.pop(CHANGES_KEY, None)
        check_same_run(str(output_dir), saved, config, may_differ, changes)
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
) -> list[dict[str, Any]]:
    """Refuse to mix two runs.

    Args:
        where: What the saved config belongs to.
        saved: Its config.
        config: The config of this run.
        may_differ: Keys that may differ, since they change no step.
        changes: Keys whose change the user has asked for.

    Returns:
        The requested changes that apply: dictionaries of `argument`, `before` and `after`.

    Raises:
        ValueError: Lists the other keys that differ.
    """
    saved, config = ({k: v for k, v in values.items() if k not in may_differ} for values in (saved, config))
    refused = [{k: v for k, v in values.items() if k not in changes} for values in (saved, config)]
    found = differences(*refused)
    if found:
        raise ValueError(
            f"{where} is of a run with another config: {'; '.join(found)}. Give another output_dir, or name the "
            "arguments in change_on_resume."
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
    write_atomically(output_dir / CONFIG_FILE, lambda path: path.write_text(yaml.safe_dump(values, sort_keys=False)))


def read_changes(output_dir: Path) -> list[dict[str, Any]]:
    """Read the changes that `write_config` recorded: `step`, `argument`, `before` and `after` of each."""
    path = output_dir / CONFIG_FILE
    return (yaml.safe_load(path.read_text()) or {}).get(CHANGES_KEY, []) if path.is_file() else []
