"""Telling by their names and sizes whether a data set's files have changed."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def fingerprint_files(dataset: str) -> str | None:
    """16 hexadecimal digits that change when a file comes, goes, or gets another name or size.

    They stay when a folder is moved or copied: names count from the folder on, and times not at all. Files that are
    hidden, or that `datasets` keeps beside a data set it has saved, do not count.

    Args:
        dataset: A folder, a file or a pattern of files; see `ImageArguments`.

    Returns:
        The digits, or `None` for what is not on this machine's disks. The fingerprints of `datasets` would not do for
        the Hub: they change with its version and with any commit, to the README for one.
    """
    path = Path(dataset).expanduser()
    if dataset == "digits":
        return None
    if path.is_dir():
        files = _files_below(str(path), "")
    else:
        found = [path] if path.is_file() else path.parent.glob(path.name)
        files = ((file.name, file.stat().st_size) for file in found if file.is_file())
    lines = sorted(f"{name}\0{size}\n" for name, size in files)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()[:16] if lines else None


def _files_below(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Name, from the first folder on, and size in bytes of every file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or (entry.name.startswith("cache-") and entry.name.endswith(".arrow")):
                continue
            if entry.is_dir():
                yield from _files_below(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield f"{prefix}{entry.name}", entry.stat().st_size
