"""Identify networks by their weights, data sets by their files, and runs by their settings."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .files import local_path
from .reading import walk_files


def fingerprint(*modules: nn.Module) -> str:
    """Return the start of the SHA-256 of all names, types and values in the modules' state dicts: 16 digits."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fingerprint_files(dataset: str) -> str | None:
    """Return 16 digits that change when a file is added, removed or renamed, or has another size.

    They stay the same when a folder is moved or copied: names count from the folder on, and times do not count. Hidden
    files do not count either, nor those that `datasets` keeps beside a data set it has saved.

    Args:
        dataset: A folder, a file or a pattern of files; see `ImageArguments`.

    Returns:
        The digits, or `None` for what is not on this machine's disks. The fingerprints of `datasets` cannot serve for
        the Hub: they change with its version and with any commit, even one to the README.
    """
    path = local_path(dataset)
    if dataset == "digits":
        return None
    files: Iterable[tuple[str, int]]
    if path.is_dir():
        files = (
            (name, entry.stat().st_size)
            for name, entry in walk_files(path)
            if not (entry.name.startswith("cache-") and entry.name.endswith(".arrow"))
        )
    else:
        found = [path] if path.is_file() else path.parent.glob(path.name)
        files = ((file.name, file.stat().st_size) for file in found if file.is_file())
    lines = sorted(f"{name}\0{size}\n" for name, size in files)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()[:16] if lines else None


def differences(there: Mapping[str, Any], now: Mapping[str, Any], unquoted: Collection[str] = ()) -> list[str]:
    """Describe each setting that differs.

    Texts that hold a JSON object are compared as objects, so that spaces and the order of keys do not count.

    Args:
        there: Settings that were found.
        now: Settings of this run.
        unquoted: Keys whose values are too long to be shown.

    Returns:
        A text for each key that differs.
    """
    return [
        key if key in unquoted else f"{key}: {_quoted(there.get(key))} there, {_quoted(now.get(key))} now"
        for key in sorted(set(there) | set(now))
        if _meaning(there.get(key)) != _meaning(now.get(key))
    ]


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _meaning(value: Any) -> Any:
    """Parse a text that holds a JSON object; return anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
