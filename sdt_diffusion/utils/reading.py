"""Read files that others may have damaged, cut, linked or prepared: within limits, with errors that name the file."""

import argparse
import hashlib
import json
import os
import pickle
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from safetensors import SafetensorError, safe_open

#: Text files that this package reads are far smaller; a larger one is another file.
MAX_TEXT_BYTES = 64 << 20
#: File beside weights that holds the SHA-256 of each of them.
CHECKSUMS_FILE = "checksums.json"
WEIGHTS_ENDING = ".safetensors"
#: What wrappers (DistributedDataParallel, torch.compile) put before the names of all weights.
WRAPPERS = ("module.", "_orig_mod.")


class _PlainYamlLoader(yaml.SafeLoader):
    """Refuses aliases, with which a short file can describe gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"aliases such as *{event.anchor} are not supported")
        return super().compose_node(parent, index)


class PlainYamlDumper(yaml.SafeDumper):
    """Writes what occurs twice two times, since `read_yaml` refuses aliases."""

    def ignore_aliases(self, data):
        """Return that nothing is written as an alias."""
        return True


def read_text(path: Path) -> str:
    """Read a text file of at most 64 MiB.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read.
        ValueError: If it is not a file, such as a named pipe, is too large, or is not UTF-8.
    """
    # Without O_NONBLOCK, opening a named pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    status = os.fstat(descriptor)
    refused = None
    if not stat.S_ISREG(status.st_mode):
        refused = f"{path} is not a file."
    elif status.st_size > MAX_TEXT_BYTES:
        refused = f"{path} has {status.st_size:,} bytes, too many for a text file of this package."
    if refused:
        os.close(descriptor)
        raise ValueError(refused)
    with os.fdopen(descriptor, "rb") as file:
        content = file.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not a text in UTF-8.") from error


def read_json(path: Path, kind: type = dict, finite: bool = True) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        kind: Type of the value it must hold.
        finite: Refuse NaN and Infinity, which are not JSON but which Python writes.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read.
        ValueError: If it is not valid JSON, or holds another type; names the file.
    """
    text = read_text(path)
    try:
        value = json.loads(text, parse_constant=_refuse_constant if finite else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error}).") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}, not a {kind.__name__}.")
    return value


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty one.

    Args:
        path: The file.
        loader: Class that turns its words into values.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read.
        ValueError: If it is not valid YAML, has aliases, or holds something else; names the file.
    """
    text = read_text(path)
    plain = type(f"Plain{loader.__name__}", (_PlainYamlLoader, loader), {})
    try:
        values = yaml.load(text, Loader=plain)  # a SafeLoader
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of names to values.")
    return {str(key): value for key, value in values.items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is not a dictionary)
    except (SafetensorError, OSError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_state_dict(path: Path, keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """Read a state dict that torch.save or safetensors wrote, without running code from the file.

    Args:
        path: The file. The prefixes of wrappers such as DistributedDataParallel are removed from all names.
        keys: Under which of a checkpoint's keys to look for the state dict, the best first; it may also be at the top.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds code, something else, or values that are NaN or infinite.
    """
    if path.suffix == ".safetensors":
        return _plain_tensors(path, read_tensors(path))
    if not path.is_file():  # a named pipe would be waited for
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        # Training checkpoints keep their arguments in a Namespace, which holds values only.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything for a damaged file
        reason = "it is damaged, or not a file of torch.save"  # torch's own message advises to run the code in it
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            reason = (
                "it holds pickled code, which is not run. If you trust the file, save its weights alone, by "
                "checkpoint = torch.load(path, weights_only=False) and torch.save(checkpoint[key], new_path), where "
                "key is that of the weights, such as 'ema'"
            )
        raise ValueError(f"{path} cannot be read: {reason}.") from error
    nested = isinstance(checkpoint, Mapping) and next((key for key in keys if key in checkpoint), None)
    state_dict = checkpoint[nested] if nested else checkpoint
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state_dict.items()
    ):
        raise ValueError(f"{path} holds no state dict, neither at the top nor under {' or '.join(map(repr, keys))}.")
    return _plain_tensors(path, state_dict)


def _plain_tensors(path: Path, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors without a prefix of all names, and refuse those that no network computes with."""
    size = path.stat().st_size
    for name, value in state_dict.items():
        plain = value.layout == torch.strided and not value.is_quantized and not value.is_complex()
        # A stride of 0 describes any number of elements in a few bytes.
        plain = plain and value.numel() * value.element_size() <= size
        if not plain or (value.is_floating_point() and not torch.isfinite(value).all()):
            raise ValueError(f"{path} cannot be used: {name} is not a plain tensor of finite numbers.")
    tensors = dict(state_dict)
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def check_tensors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str, finite: bool = True
) -> None:
    """Refuse tensors that are missing, left over, of another shape or type, or not finite.

    Args:
        found: Tensors that were read.
        expected: Tensors of the names, shapes and types that they must have; their values do not count.
        where: What was read, for the message.
        finite: Whether all values must be finite.

    Raises:
        ValueError: Names the tensors.
    """
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"{verb} {shortened(names)}" for verb, names in (("it lacks", missing), ("it has", extra)) if names]
        raise ValueError(f"{where} does not fit: {' and '.join(parts)}.")
    for name, tensor in found.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ValueError(
                f"{where} does not fit: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {wanted.dtype} "
                f"of shape {tuple(wanted.shape)}."
            )
    if finite:
        check_finite(found, where)


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse tensors with values that are NaN or infinite.

    Args:
        tensors: Such as a state dict.
        where: What was read, for the message.

    Raises:
        ValueError: Names the first such tensor.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{where} cannot be used: {name} has values that are NaN or infinite.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite; those of an integer tensor are."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())  # reads the tensor once, without a copy


def shortened(names: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """Return names in one line, with the number of those beyond the limit."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + rest


def walk_files(folder: Path | str, prefix: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    """Yield the name, from the folder on, and the entry of every file below it, always in the same order.

    Links are followed, but no folder is entered twice, so that a link to a folder above ends the walk there. Hidden
    files and folders are left out, and so are pipes, sockets and devices.

    Raises:
        OSError: If a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [(Path(folder), prefix)]  # a list, since folders may be nested deeper than calls can be
    while waiting:
        path, prefix = waiting.pop()
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                # Unlike the entry's own methods, these do not raise for a link to itself.
                if Path(entry).is_dir():
                    folders.append((Path(entry), f"{prefix}{entry.name}/"))
                elif Path(entry).is_file():
                    yield f"{prefix}{entry.name}", entry
        waiting += reversed(folders)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(paths: Iterable[Path]) -> list[str]:
    """Return the SHA-256 of each file; they are read side by side, since hashing does not hold Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(checksum, paths))


def write_checksums(folder: Path) -> None:
    """Write the size and the SHA-256 of the weights in a folder beside them."""
    files = sorted(path for path in folder.glob(f"*{WEIGHTS_ENDING}") if path.is_file())
    values = {
        file.name: {"size": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, checksums(files), strict=True)
    }
    (folder / CHECKSUMS_FILE).write_text(json.dumps(values, indent=2))


def verify_checksums(folder: Path) -> None:
    """Compare the weights in a folder with the checksums beside them, if there are any.

    Raises:
        ValueError: If a file is missing or changed; names it.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return
    expected = {name: value if isinstance(value, dict) else {} for name, value in read_json(path).items()}
    present = [name for name in expected if Path(name).name == name and (folder / name).is_file()]
    missing = sorted(set(expected) - set(present))
    if missing:
        raise ValueError(f"{folder} is not complete: {shortened(missing)} of {CHECKSUMS_FILE} is missing.")
    sizes = [(folder / name).stat().st_size for name in present]
    # Compare sizes first: reading a file that has become larger may take hours.
    whole = [name for name, size in zip(present, sizes, strict=True) if expected[name].get("size") == size]
    found = dict(zip(whole, checksums([folder / name for name in whole]), strict=True))
    for name in present:
        if name not in found or found[name] != expected[name].get("sha256"):
            raise ValueError(
                f"{folder / name} is damaged: its SHA-256 is not the one in {CHECKSUMS_FILE}. If you changed the "
                f"weights on purpose, delete {path}."
            )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")
