"""Sort what came back from a command.

Good outcomes: `ok` (it completed, and what it wrote is whole), `refused` (exit code 1 or 2 with a short message, and
nothing half-written), `stopped` (it ended as a signal asks for), `long run` (it was busy with much work that it was
asked for). All others are bad.

What is promised where a damaged file is accepted: the numbers and weights that come out are those of the good file.
Not for content that is the user's own, in which any change makes another valid content: pictures, tables, archives,
names, settings in JSON and YAML that people may edit (but not values that make no sense), references in .npz of other
tools, and weights without checksums, such as VAEs of others. Of those, the results must only be whole and finite.
"""

import functools
import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load

from .child import Ended
from .commands import TOKEN

GOOD = ("ok", "refused", "stopped", "long run")
#: Caches of libraries, which a killed process may leave as they are.
IGNORED = ("home", "tmp")
LONG_LINE = 1000
MAX_LINES = 3
#: Files above this size are compared by their size only.
MAX_HASHED = 1 << 28
#: Parts of names of values that differ between two equal runs.
UNSTABLE = re.compile(
    r"second|throughput|speed|time|path|command|versions|images_per|memory|device|samples\.(images|made)"
)
_LIBRARY_LINE = re.compile(
    r"%\||\bit/s|s/it|it \[|Warning: |^\s+warnings\.warn|^\[(W|E)\d|^\s+(super\(\)|return |_|@)|^$"
)


def snapshot(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder; links and pipes by their kind."""
    found = {}
    for parent, folders, files in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in IGNORED]
        for name in files:
            path = Path(parent, name)
            status = path.lstat()
            regular = path.is_file() and not path.is_symlink()
            if not regular:
                digest = "special"
            elif status.st_size > MAX_HASHED:
                digest = str(status.st_size)
            else:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = digest
    return found


def problem_of(path: Path) -> str | None:
    """Return what is wrong with a file that a command wrote, or `None`."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(), parse_constant=_refuse)
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line, parse_constant=_refuse)
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".safetensors":
            for name, tensor in load(path.read_bytes()).items():
                if not torch.isfinite(tensor).all():
                    return f"not finite: {name}"
        elif path.suffix in (".npz", ".npy"):
            np.load(path, allow_pickle=False)
            if path.suffix == ".npz" and zipfile.ZipFile(path).testzip():
                return "a damaged archive"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def _refuse(name):
    raise ValueError(f"it holds {name}")


def results_of(folder: Path, writes: tuple[str, ...], out: str = "") -> dict[str, str]:
    """Return digests of the results of a command: final weights, tensors, numbers and pictures."""
    found = {"stdout": out.strip().splitlines()[-1]} if out and not writes else {}
    for top in writes:
        for path in sorted((folder / top).rglob("*")):
            name = str(path.relative_to(folder))
            if "checkpoint-" in name or not path.is_file():
                continue
            if path.suffix == ".safetensors":
                for key, tensor in load(path.read_bytes()).items():
                    content = tensor.flatten().view(torch.uint8).numpy().tobytes()
                    found[f"{name}: {key}"] = hashlib.sha256(content).hexdigest()
            elif path.name in ("results.json", "fid.json", "accuracy.json", "samples.json", "manifest.json"):
                for key, value in _leaves(json.loads(path.read_text())):
                    if isinstance(value, (int, float)) and not UNSTABLE.search(key):
                        found[f"{name}: {key}"] = repr(value)
            elif path.suffix in (".npy", ".npz"):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            elif path.suffix == ".png" and "curve" not in name:
                found[name] = hashlib.sha256(Image.open(path).tobytes()).hexdigest()
    return found


def _leaves(value, name=""):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
    else:
        for key, each in items:
            yield from _leaves(each, f"{name}.{key}")


def own_lines(err: str) -> list[str]:
    """Return the lines of stderr that are neither progress bars nor warnings of libraries."""
    lines = [line.rpartition("\r")[2] for line in err.rstrip("\r\n").split("\n")]
    return [line for line in lines if not _LIBRARY_LINE.search(line)]


def holds_token(folder: Path, ended: Ended, given: tuple[str, ...]) -> str | None:
    """Return where the token's bytes are, besides the files in which it was given."""
    for name, text in (("stdout", ended.out), ("stderr", ended.err)):
        if TOKEN in text:
            return name
    for parent, _, files in os.walk(folder):
        for name in files:
            path = Path(parent, name)
            if path.name in given or path.is_symlink() or not path.is_file() or path.lstat().st_size > MAX_HASHED:
                continue
            if TOKEN.encode() in path.read_bytes():
                return str(path.relative_to(folder))
    return None


@functools.cache
def _part(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith(f"{top}/") for top in tops)


def half_written(
    folder: Path, before: dict[str, str], writes: tuple[str, ...], partial_ok: bool = False
) -> str | None:
    """Return what a command left that is not whole, or changed though it is not its own, or `None`."""
    after = snapshot(folder)
    for name, digest in before.items():
        if after.get(name) != digest and not _part(name, writes):
            return f"{name} was {'changed' if name in after else 'removed'}"
    for name, digest in after.items():
        if digest == before.get(name) or digest == "special":
            continue
        if "partial" in name:
            if partial_ok:
                continue
            return f"{name} is left over"
        problem = problem_of(folder / name)
        if problem:
            return f"{name}: {problem}"
    outside = sorted(path.name for path in folder.parent.iterdir() if path.name != folder.name)
    return f"written outside: {outside[0]}" if outside else None


def judge(ended: Ended) -> tuple[str, str]:
    """Return the outcome by how a child ended and what it printed, and a remark; files are looked at by others."""
    own = own_lines(ended.err)
    last = own[-1] if own else ""
    if ended.timed_out:
        frames = ended.err.partition("most recent call first")[2]
        where = re.findall(r'(?:site-packages/|/)((?:sdt_diffusion|torch|datasets|PIL)/\S+\.py)", line (\d+)', frames)
        return "hang", " < ".join(f"{name}:{line}" for name, line in where[:8])
    if ended.code < 0:
        return "crash", f"signal {-ended.code}"
    if "Traceback (most recent call last)" in ended.err:
        return "traceback", last
    if ended.code == 0:
        return "ok", ""
    if ended.code not in (1, 2):
        return "odd exit code", f"{ended.code}: {last}"
    if any(len(line) > LONG_LINE for line in own):
        return "long", f"a line of {max(map(len, own))} characters: {last[:200]}"
    if len(own) > MAX_LINES:
        return "many lines", f"{len(own)} lines: {last}"
    if not last:
        return "no message", f"exit code {ended.code}"
    return "refused", last
