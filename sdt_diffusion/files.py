"""Files that are either whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path of the same ending, and moves the file to `path` when it returns."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        if error.filename is None:  # a full disk does not say which file it is
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def move_into(folder: Path, save: Callable[[Path], Any]) -> None:
    """Calls `save` with a temporary folder, then moves what it holds into `folder`, replacing what is there."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save(partial)
        # Folders before files: model_index.json comes once the components it names are there.
        for path in sorted(partial.iterdir(), key=lambda path: (path.is_file(), path.name)):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(path: Path, *endings: str) -> None:
    """Refuses a file to write that is there already, or that is to have another ending than those that can be written.

    Raises:
        ValueError: Names the file, and what to do.
    """
    if path.suffix not in endings:
        raise ValueError(f"{path} must end in {' or '.join(endings)}.")
    if path.exists():
        raise ValueError(f"{path} exists already; give another name, or delete it.")


def check_writable(folder: Path) -> None:
    """Makes a folder, and finds out whether files can be written there before hours of work are lost for it.

    Raises:
        OSError: Names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"No file can be written there: {error.strerror}", str(folder)) from error


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
