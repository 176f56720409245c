"""Sizes of the Triton kernels' blocks: from a fixed table, or, if asked for, the fastest of a few on this GPU.

With the environment variable SDT_DIFFUSION_AUTOTUNE=1 some launches of each kernel are measured at its first call with
a new size, and the fastest is kept in `sdt_diffusion/launches.json` in the user's cache folder (`$XDG_CACHE_HOME`, or
`~/.cache`). Other blocks add numbers in another order: the last bits may then differ from those of the fixed table,
and between machines that measured differently. Delete the file to measure again.
"""

import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .pruning import TILE

logger = logging.getLogger(__name__)


class Launch(NamedTuple):
    """Sizes of a kernel's blocks, and how it is compiled.

    Args:
        block_m: Queries of a block.
        block_n: Keys of a block.
        num_warps: Warps of a block.
        num_stages: Stages of its pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


#: The fixed table, for heads of at most 64 columns and for wider ones: fits into registers on sm_80, sm_90 and sm_100.
DEFAULTS = {
    "forward": (Launch(128, 32, 4, 2), Launch(128, 32, 8, 2)),
    "backward_query": (Launch(64, 32, 4, 2), Launch(64, 32, 8, 2)),
    "backward_key": (Launch(32, 64, 8, 2), Launch(32, 64, 8, 2)),
}
#: What else is measured.
OTHERS = {
    "forward": (Launch(64, 32, 4, 2), Launch(64, 64, 4, 2), Launch(128, 64, 8, 2), Launch(128, 64, 8, 3)),
    "backward_query": (Launch(64, 64, 4, 2), Launch(128, 32, 8, 2), Launch(128, 64, 8, 2)),
    "backward_key": (Launch(32, 64, 4, 2), Launch(64, 64, 8, 2), Launch(32, 128, 8, 2)),
}


@functools.cache
def candidates(kernel: str, head_dim: int, tokens: int, pruned: bool = False) -> list[Launch]:
    """Return the launches that are measured for a kernel, that of the fixed table first.

    Args:
        kernel: "forward", "backward_query" or "backward_key".
        head_dim: Size of a head.
        tokens: Tokens that attend to each other.
        pruned: Whether tiles are skipped: a block then is a tile or a part of one.
    """
    largest = max(16, 1 << (tokens - 1).bit_length())  # short rows need no larger block
    largest = min(largest, TILE) if pruned else largest
    launches = (DEFAULTS[kernel][head_dim > 64], *OTHERS[kernel])
    shrunk = (Launch(min(m, largest), min(n, largest), *rest) for m, n, *rest in launches)
    return list(dict.fromkeys(shrunk))


def choose_launch(
    kernel: str, query: torch.Tensor, tokens: int, pruned: bool, start: Callable[[Launch], object]
) -> Launch:
    """Return the launch of the fixed table, or the fastest if SDT_DIFFUSION_AUTOTUNE is 1.

    Args:
        kernel: "forward", "backward_query" or "backward_key".
        query: The queries, for their head size, dtype and device.
        tokens: Tokens that attend to each other.
        pruned: Whether tiles are skipped.
        start: Runs the kernel by a launch; may be called any number of times.

    Raises:
        ValueError: If SDT_DIFFUSION_AUTOTUNE is neither 0 nor 1.
    """
    launches = candidates(kernel, query.shape[-1], tokens, pruned)
    if not _autotunes() or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        return launches[0]
    bucket = 1 << (tokens - 1).bit_length()
    device = torch.cuda.get_device_name(query.device) if query.is_cuda else query.device.type
    size = f"{device}, {kernel}, head_dim {query.shape[-1]}, {query.dtype}, {bucket} tokens{', pruned' * pruned}"
    chosen = _chosen().get(size)
    if chosen not in launches:  # not measured, or by another version of this table
        chosen = min(launches, key=lambda launch: _milliseconds(start, launch))
        logger.info("Chose %s for %s.", chosen, size)
        _keep(size, chosen)
    return chosen


def _autotunes() -> bool:
    value = os.environ.get("SDT_DIFFUSION_AUTOTUNE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"SDT_DIFFUSION_AUTOTUNE must be 0 or 1, not {value!r}.")
    return value == "1"


def _milliseconds(start: Callable[[Launch], object], launch: Launch) -> float:
    """Measure a launch; one that the GPU or its compiler refuses takes forever."""
    import triton

    try:
        return triton.testing.do_bench(lambda: start(launch), warmup=5, rep=20, return_mode="median")
    except triton.TritonError:
        return float("inf")


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdt_diffusion" / "launches.json"


@functools.cache
def _chosen() -> dict[str, Launch]:
    """Return what was measured so far, by this process or earlier ones."""
    return _read()


def _read() -> dict[str, Launch]:
    try:
        return {size: Launch(*launch) for size, launch in json.loads(_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # there is none, or it is no such file
        return {}


def _keep(size: str, launch: Launch) -> None:
    """Add a choice to those of this process, and to the file, which others may have changed."""
    _chosen()[size] = launch
    file = _file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump({**_read(), size: launch}, temporary, indent=1)
        Path(temporary.name).replace(file)
    except OSError as error:
        logger.warning("Measured launches are not kept for later runs, as %s cannot be written: %s", file, error)
