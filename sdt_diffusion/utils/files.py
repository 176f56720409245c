"""Files that are either whole or not there, in folders that one run at a time writes to."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"


class FolderLock:
    """Keeps other runs from writing to a folder for as long as this process lives, or until it is released.

    The main process of a run takes it, before it looks at what the folder holds. It is a lock of POSIX, which forked
    workers do not inherit, so that one that outlives a killed run does not keep the next one out. Nothing is locked
    where the system, or the folder's file system, knows no such locks.

    Args:
        folder: The folder; it is made where there is none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            ValueError: If another process has it; names the folder.
            OSError: If no file can be written to the folder.
        """
        check_writable(self.folder)
        path = self.folder / LOCK_FILE
        while fcntl and self._descriptor is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                os.close(descriptor)
                raise ValueError(
                    f"Another process is writing to {self.folder}: wait until it is done, or give another folder."
                ) from error
            except OSError:  # a file system without locks
                pass
            if _is_file(descriptor, path):
                self._descriptor = descriptor
            else:  # its last owner deleted it in between
                os.close(descriptor)

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._descriptor is not None:
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self):
        self.acquire()
        return self

    def __exit__(self, *exception):
        self.release()


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path of the same ending, and moves the file to `path` when it returns.

    Raises:
        OSError: If the file cannot be written, or safetensors says so; names it.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        if error.filename is None:  # a full disk does not say which file it is
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    except SafetensorError as error:  # which is no OSError, whatever it says of the disk
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
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


def _is_file(descriptor, path):
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
