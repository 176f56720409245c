"""Checkpoints that are either whole or not there, and the folder of a run."""

import json
import logging
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from ..utils.files import sync, write_atomically
from ..utils.fingerprint import differences
from .config import RESUMABLE_CHANGES

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"
#: What a finished run leaves: a pipeline or a classifier.
PRODUCTS = ("model_index.json", "config.json")
#: Written last into a checkpoint: its step, its run's config, and the size of every file.
MANIFEST_FILE = "checkpoint.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says which one is left."""


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
    """Writes `checkpoint-<step>` under another name, moves it into place, then deletes the oldest beyond the limit.

    Called by all processes; the main one makes, moves and deletes the folders.

    Args:
        output_dir: The run's folder.
        step: Optimizer steps done.
        save: Fills the folder it is given.
        total_limit: Checkpoints to keep, `None` for all.
        config: The run's config, kept in the manifest.
        state: Small things to go on from, kept in the manifest too.
        is_main_process: Whether this process is the main one.
        wait_for_everyone: Barrier of the processes.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: If it cannot be written, on a full disk for one. Nothing is left of it, and no other deleted.
    """
    path, partial = output_dir / f"checkpoint-{step}", output_dir / f"checkpoint-{step}.partial"
    if is_main_process:
        for left_by_a_kill in output_dir.glob("checkpoint-*.partial"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
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
            for path_inside in (*inside, partial / MANIFEST_FILE, partial):  # folders too: their lists of files
                sync(path_inside)
            if path.exists():  # the run started over from before it
                path.rename(output_dir / f"checkpoint-{step}.old.partial")
            partial.rename(path)
            sync(output_dir)
            shutil.rmtree(output_dir / f"checkpoint-{step}.old.partial", ignore_errors=True)
    except BaseException as error:
        if is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(f"{path} could not be written: {error}. {_what_is_left(output_dir)}") from error
        raise
    if is_main_process and total_limit is not None:
        # Damaged ones do not count: a later one of those must not cost the run the one it has just written.
        others = [other for other in complete_checkpoints(output_dir) if other != path]
        for old in others[: max(0, len(others) + 1 - max(1, total_limit))]:
            going = old.rename(old.with_name(f"{old.name}.partial"))  # half of it would look like a damaged one
            shutil.rmtree(going, ignore_errors=True)
    wait_for_everyone()
    return path


def _what_is_left(output_dir):
    whole = [path.name for path in complete_checkpoints(output_dir)]
    if not whole:
        return "There is none before it."
    return f"{whole[-1]} is whole: once this can be written, go on with --resume_from_checkpoint latest."


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, the oldest first, whole or not."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=step_of)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Those that can be gone on from."""
    return [path for path in list_checkpoints(output_dir) if is_complete(path)]


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("checkpoint-"))


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: `step`, its run's `config`, `state`, and the size of its `files`."""
    return json.loads((path / MANIFEST_FILE).read_text())


def is_complete(path: Path) -> bool:
    """Whether a checkpoint has its manifest and every file in its full size."""
    try:
        sizes = read_manifest(path)["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from.

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


def check_output_dir(output_dir: Path, config: dict[str, Any], resume: bool, may_change: Collection[str] = ()) -> None:
    """Refuses a folder that holds another run, or this one if it is not to be continued. Writes nothing.

    Args:
        output_dir: The run's folder.
        config: The run's resolved arguments.
        resume: Whether the run continues what the folder holds.
        may_change: See `check_same_run`.

    Raises:
        ValueError: Says what the folder holds, and what to do.
    """
    config_file = output_dir / CONFIG_FILE
    results = list_checkpoints(output_dir) + [output_dir / name for name in PRODUCTS if (output_dir / name).exists()]
    if config_file.is_file():
        check_same_run(str(output_dir), yaml.safe_load(config_file.read_text()) or {}, config, may_change)
        if results and not resume:
            raise ValueError(
                f"{output_dir} already holds this run. Continue it with --resume_from_checkpoint latest, or give "
                "another --output_dir."
            )
    elif results:
        raise ValueError(f"{output_dir} holds {results[0].name} of something else. Give another --output_dir.")


def check_same_run(
    where: str, saved: dict[str, Any], config: dict[str, Any], may_change: Collection[str] = ()
) -> None:
    """Refuses to mix two runs.

    Args:
        where: What the saved config belongs to.
        saved: Its config.
        config: The config of this run.
        may_change: Keys that may differ, besides those that always may.

    Raises:
        ValueError: Lists the keys that differ, but for those that may.
    """
    free = RESUMABLE_CHANGES | set(may_change)
    saved, config = ({k: value for k, value in settings.items() if k not in free} for settings in (saved, config))
    found = differences(saved, config)
    if found:
        raise ValueError(f"{where} is of a run with another config: {'; '.join(found)}. Give another --output_dir.")


def write_config(output_dir: Path, config: dict[str, Any]) -> None:
    """Marks the folder as this run's."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(output_dir / CONFIG_FILE, lambda path: path.write_text(yaml.safe_dump(config, sort_keys=False)))
