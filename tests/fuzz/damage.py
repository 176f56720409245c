"""Damage a file as disks, people and attackers do: whatever it is, or knowing its format."""

import os
import random
import shutil
from pathlib import Path

from .formats import BY_ENDING

#: A sparse file that takes no space, and that no memory holds.
HUGE_BYTES = 64 << 30


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in one way, drawn at random; return what was done, in words."""
    own = BY_ENDING.get(path.suffix, ())
    if own and rng.random() < 0.55:
        words = rng.choice(own)(path, rng)
        # Files that this package wrote before it wrote checksums are read without them: what else is checked shows.
        if path.suffix == ".safetensors" and (path.parent / "checksums.json").is_file() and rng.random() < 0.5:
            (path.parent / "checksums.json").unlink()
            words += ", and its checksums deleted"
        return words
    return rng.choice(BYTES if rng.random() < 0.7 else PLACES)(path, rng)


def delete(path, rng):
    path.unlink()
    return "deleted"


def empty(path, rng):
    path.write_bytes(b"")
    return "empty"


def cut(path, rng):
    content = path.read_bytes()
    length = rng.randrange(max(len(content), 1))
    path.write_bytes(content[:length])
    return f"cut after {length} of {len(content)} bytes"


def zeros(path, rng):
    content = bytearray(path.read_bytes())
    start = rng.randrange(max(len(content), 1))
    length = min(rng.choice([1, 16, 512, 4096, len(content)]), len(content) - start)
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    return f"{length} zeros at {start}"


def flip(path, rng):
    content = bytearray(path.read_bytes())
    bit = rng.randrange(max(8 * len(content), 1))
    if content:
        content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)
    return f"bit {bit % 8} of byte {bit // 8} flipped"


def noise(path, rng):
    content = bytearray(path.read_bytes())
    start = rng.randrange(max(len(content), 1))
    length = min(rng.choice([1, 16, 512, len(content)]), len(content) - start)
    content[start : start + length] = rng.randbytes(length)
    path.write_bytes(content)
    return f"{length} random bytes at {start}"


def replace_all(path, rng):
    path.write_bytes(rng.randbytes(rng.choice([1, 100, 10_000])))
    return "random bytes only"


def append(path, rng):
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 100])))
    return "random bytes appended"


def folder(path, rng):
    path.unlink()
    path.mkdir()
    return "a folder instead"


def pipe(path, rng):
    path.unlink()
    os.mkfifo(path)
    return "a pipe instead"


def link_to_itself(path, rng):
    path.unlink()
    path.symlink_to(path.name)
    return "a link to itself instead"


def dangling_link(path, rng):
    path.unlink()
    path.symlink_to("nowhere")
    return "a link to nothing instead"


def huge(path, rng):
    path.unlink()
    with path.open("wb") as file:
        file.truncate(HUGE_BYTES)
    return "a sparse file of 64 GiB instead"


def loop(path, rng):
    (path.parent / "loop").symlink_to(".")
    return "a link to the folder itself beside it"


def folder_loop(path, rng):
    """Replace the folder that holds the file by a link to itself."""
    if path.parent == Path(path.anchor) or path.parent.name == "case":
        return link_to_itself(path, rng)
    parent = path.parent
    shutil.rmtree(parent)
    parent.symlink_to(parent.name)
    return "its folder a link to itself"


def empty_folder(path, rng):
    if path.parent.name == "case":
        return delete(path, rng)
    for other in path.parent.iterdir():
        if other.is_file():
            other.unlink()
    return "all files of its folder deleted"


BYTES = (delete, empty, cut, zeros, flip, flip, noise, replace_all, append)
PLACES = (folder, pipe, link_to_itself, dangling_link, huge, loop, folder_loop, empty_folder)
