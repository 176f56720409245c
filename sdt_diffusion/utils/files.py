"""Write files completely or not at all, lock folders, and shorten paths for others to read."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


class FolderLock:
    """Keeps other runs from writing to a folder until it is released or this process ends.

    The main process of a run takes it before it looks at what the folder holds. It is a POSIX lock, which forked
    workers do not inherit: a worker that outlives a killed run does not keep the next run out. Nothing is locked where
    the operating system or the folder's file system has no such locks.

    Args:
        folder: The folder; made if it does not exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            ValueError: If another process holds it; names the folder.
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
            except OSError:
                pass  # the file system has no locks
            if _is_file(descriptor, path):
                self._descriptor = descriptor
            else:  # the last owner has deleted the file in between: try again with a new one
                os.close(descriptor)

    def release(self) -> None:
        """Release the lock if it is held."""
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
    """Call `write` with a temporary path of the same ending, and move the file to `path` when it returns.

    Raises:
        OSError: If the file cannot be written; names it.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        with _naming(path):
            # Make the file anew: what lies there may be a link that leads elsewhere.
            partial.unlink(missing_ok=True)
            partial.open("xb").close()
            write(partial)
            sync(partial)
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # such as a folder of that name, which the error above names
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name what was to be written in errors of the disk, which safetensors raises as errors of its own."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # as with a full disk
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    """Write a JSON file completely or not at all; see `valid_json`.

    Raises:
        OSError: If it cannot be written; names it.
    """
    text = json.dumps(valid_json(values), indent=indent, allow_nan=False)
    write_atomically(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))


def valid_json(values: Any) -> Any:
    """Return values in which numbers that are NaN or infinite, for which JSON has no words, are `None`."""
    if isinstance(values, dict):
        return {key: valid_json(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [valid_json(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def check_temporary_folder(num_workers: int) -> None:
    """Refuse to start loader workers where their sockets cannot be made: they would wait for each other forever.

    Raises:
        ValueError: Names the folder for temporary files.
    """
    folder = tempfile.gettempdir()
    # A socket's path may have 107 characters; multiprocessing appends about 30.
    if num_workers and len(os.fsencode(folder)) > 107 - 40:
        raise ValueError(f"The folder for temporary files, {folder}, has too long a path for workers: set TMPDIR.")


def require_space(folder: Path, num_bytes: float, what: str) -> None:
    """Refuse to begin work whose results the disk cannot hold.

    Args:
        folder: Folder that the results go to, or that will be made.
        num_bytes: Estimate of their size.
        what: What they are, for the message.

    Raises:
        OSError: If less is free.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{what} will take about {num_bytes / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free",
            str(folder),
        )


def move_into(folder: Path, save: Callable[[Path], Any]) -> None:
    """Call `save` with a temporary folder, then move what it holds into `folder`, replacing what is there.

    Raises:
        OSError: If it cannot be written; names the folder.
    """
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _naming(folder):
            save(partial)
        # Move folders before files, so that model_index.json never names components that are missing.
        for path in sorted(partial.iterdir(), key=lambda path: (path.is_file(), path.name)):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(path: Path, *endings: str) -> None:
    """Refuse to write a file that exists already, or whose name does not end in one of `endings`.

    Raises:
        ValueError: Names the file, and what to do.
    """
    if path.suffix not in endings:
        raise ValueError(f"{path} must end in {' or '.join(endings)}.")
    if path.exists():
        raise ValueError(f"{path} exists already; give another name, or delete it.")


def check_writable(folder: Path) -> None:
    """Make a folder, and check that files can be written there before hours of work depend on it.

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
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def local_path(name: str) -> Path:
    """Return the path that a name means if it means one; `~` is the home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # there is no such user
        return Path(name)


def shorten_path(text: Any, home: str = "~/") -> Any:
    """Return a path, or a text with paths, without details of the machine and its user.

    Paths in the working directory become relative, those in the home begin with `home`. Of another absolute path only
    the last name is kept, behind `.../`. What is not a string is returned as it is, lists item by item.
    """
    if isinstance(text, (list, tuple)):
        return [shorten_path(item, home) for item in text]
    if not isinstance(text, str):
        return text
    for folder, short in ((Path.cwd(), ""), (Path.home(), home)):
        if len(folder.parts) > 1:  # not the root
            text = text.replace(f"{folder}/", short)
            text = (short.rstrip("/") or ".") if text == str(folder) else text
    return f".../{Path(text).name}" if Path(text).is_absolute() else text


def _is_file(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
