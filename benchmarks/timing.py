"""Measure candidates in turns in one process, and describe where they were measured."""

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sdt_diffusion.utils.files import write_atomically


def timed(step: Callable[[], Any], device: str) -> float:
    """Return the seconds that a step takes, of processor time if it computes in one thread of a CPU."""
    on_cpu = torch.device(device).type == "cpu"
    clock = time.thread_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    if not on_cpu:
        torch.cuda.synchronize()
    return clock() - start


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int, device: str, name: str) -> dict[str, float]:
    """Return the median seconds of each step; all take turns, so that noise of the machine affects them alike."""
    for step in steps.values():
        for _ in range(2):
            timed(step, device)
    times: dict[str, list[float]] = {step: [] for step in steps}
    for _ in tqdm(range(rounds), desc=name, leave=False):
        for step_name, step in steps.items():
            times[step_name].append(timed(step, device))
    return {step: statistics.median(seconds) for step, seconds in times.items()}


def describe_machine(device: str) -> dict[str, Any]:
    """Return what the times depend on: the processor, its threads, and versions."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.is_file() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def keep_freed_memory() -> None:
    """Tell glibc not to return freed memory to the system.

    It does so when the top of the heap is free, and the next step then pages all of it in again. That takes up to a
    fifth of a training step, and affects only the model that happens to lie at the top.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD; setting it stops glibc from tuning the other, so set that too
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that glibc would tune it to
    except (OSError, AttributeError):
        print("Not glibc: freed memory may return to the system, which adds noise.")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows of the same keys as a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |")


def write_results(path: str | None, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write everything that was measured to a JSON file."""
    if path is not None:
        text = json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
        write_atomically(Path(path), lambda file: file.write_text(text))
