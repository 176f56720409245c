"""Run one command in a forked child, with limits on its memory, time and files."""

import contextlib
import faulthandler
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from tests.scripts.forks import end_with

from .bases import BASES

MEMORY = 6 << 30
CPU_SECONDS = 180
FILE_BYTES = 256 << 20
#: What a command may print; more is cut.
MAX_OUTPUT = 8 << 20


@dataclass(frozen=True)
class Limits:
    """What a child may use: seconds in all, bytes of a file, and when which signal is sent to it."""

    seconds: float = 60
    file_bytes: int = FILE_BYTES
    signal: int | None = None
    signal_after: float = 0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a child ended; `code` is negative for a signal, as in `subprocess`."""

    code: int
    timed_out: bool
    seconds: float
    out: str
    err: str


def enter(folder: Path) -> None:
    """Work in a folder, and let libraries keep their caches there."""
    os.chdir(folder)
    for name in ("home", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    os.environ.update(HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"))
    tempfile.tempdir = None
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        setattr(datasets.config, name, folder / "home" / name.lower())


def run_child(folder: Path, base: str, argv: list[str], limits: Limits) -> Ended:
    """Run the script of a base with a command line in a folder, as a process of its own would."""
    pipes = [os.pipe() for _ in range(2)]
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            _prepare(folder, pipes, limits)
            sys.argv = [BASES[base].script, *argv]
            end_with(BASES[base].main)
        finally:  # a mistake of this harness
            os.write(2, traceback.format_exc().encode())
            os._exit(70)
    for _, writing in pipes:
        os.close(writing)
    try:
        return _watch(pid, [reading for reading, _ in pipes], start, limits)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        for reading, _ in pipes:
            os.close(reading)


def _prepare(folder: Path, pipes: list[tuple[int, int]], limits: Limits) -> None:
    os.setsid()
    faulthandler.register(signal.SIGUSR1, file=2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, (reading, writing) in enumerate(pipes, start=1):
        os.dup2(writing, number)
        os.close(reading)
        os.close(writing)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    enter(folder)
    os.environ.update(limits.environment)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, value in (
        (resource.RLIMIT_AS, mapped + MEMORY),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _watch(pid: int, pipes: list[int], start: float, limits: Limits) -> Ended:
    """Collect what a child prints until it ends, and kill it at its limit."""
    texts = {pipe: bytearray() for pipe in pipes}
    signaled = timed_out = False
    status = None
    while status is None:
        for pipe in select.select(pipes, [], [], 0.02)[0]:
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                pipes = [other for other in pipes if other != pipe]
            elif len(texts[pipe]) < MAX_OUTPUT:
                texts[pipe] += chunk
        passed = time.monotonic() - start
        if limits.signal is not None and not signaled and passed >= limits.signal_after:
            os.kill(pid, limits.signal)
            signaled = True
        if passed >= limits.seconds and not timed_out:
            os.killpg(pid, signal.SIGUSR1)  # it and its workers print where they are
            timed_out = True
        if passed >= limits.seconds + 1:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        if not pipes:
            time.sleep(0.02)
        done, ended = os.waitpid(pid, os.WNOHANG)
        status = ended if done else None
    while pipes and (ready := select.select(pipes, [], [], 0)[0]):  # what was left in the pipes
        for pipe in ready:
            chunk = os.read(pipe, 1 << 16)
            if chunk:
                texts[pipe] += chunk
            else:
                pipes = [other for other in pipes if other != pipe]
    out, err = (bytes(text).decode(errors="replace") for text in texts.values())
    return Ended(os.waitstatus_to_exitcode(status), timed_out, time.monotonic() - start, out, err)
