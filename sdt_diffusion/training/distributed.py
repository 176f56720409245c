"""Processes, devices and precision, as the arguments and `accelerate launch` set them; FSDP2; signals."""

import contextlib
import multiprocessing
import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, is_bf16_available, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from .config import RunArguments

#: How long processes wait for each other: one of them may write a checkpoint to a slow disk.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


def process_state() -> PartialState:
    """Return the processes, before there is an accelerator."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=COLLECTIVE_TIMEOUT)


def build_accelerator(run: RunArguments) -> Accelerator:
    """Build the accelerator of a run whose precision is resolved, and set the threads of CPU processes."""
    if run.allow_tf32:
        torch.set_float32_matmul_precision("high")
    process_state()
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(non_blocking=True),  # batches come from pinned memory
        mixed_precision=run.mixed_precision,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        log_with=None if run.report_to == "none" else run.report_to,
        project_config=ProjectConfiguration(
            project_dir=run.output_dir, logging_dir=str(Path(run.output_dir) / run.logging_dir)
        ),
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(run.cpu_threads or default_threads())
    return accelerator


def default_threads() -> int:
    """Return the threads of a CPU process: OMP_NUM_THREADS if the user has set it, else its share of the cores."""
    requested = os.environ.get("OMP_NUM_THREADS", "")
    if requested.isdigit() and int(requested) > 0 and not _set_by_accelerate():
        return int(requested)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _set_by_accelerate() -> bool:
    """Return whether OMP_NUM_THREADS comes from `accelerate launch`, which sets it to 1, and not from the user."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # not started by accelerate
        return False
    try:
        return "OMP_NUM_THREADS" not in psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return True


def resolve_precision(requested: str | None) -> str:
    """Return the mixed precision of a run: as requested, else as accelerate is configured, else bf16 if supported.

    `accelerate launch` says "no" unless it is configured otherwise, so only its other values count as a configuration.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if requested is not None or configured != "no":
        return requested or configured
    device = process_state().device
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if device.type not in ("cpu", "mps") and is_bf16_available() else "no"


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Call `accelerator.prepare`, with FSDP2 computing in the same precision as DDP: that of autocast.

    FSDP2's own mixed precision would round the model's inputs too: timesteps to the 8 bits of bf16.
    """
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    if any(group["rule"] == "adamw8bit" for group in optimizer.param_groups):
        raise ValueError("optimizer adamw8bit has moments that FSDP2 cannot shard: choose adamw or muon, or use DDP.")
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    model, optimizer = accelerator.prepare(model, optimizer)
    autocast_forward(accelerator, model)
    return model, optimizer


def autocast_forward(accelerator: Accelerator, module: nn.Module) -> None:
    """Let a module that accelerate has not prepared compute in the precision of the run."""
    if accelerator.mixed_precision != "no":
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
        module.forward = torch.autocast(accelerator.device.type, dtype)(module.forward)


def compile_model(model: nn.Module, mode: str) -> None:
    """Compile a model in place, so that its weights keep their names; to be called before it is wrapped.

    Args:
        model: The model.
        mode: "none", "regional" for its blocks, which share one graph, or "full".

    Raises:
        ValueError: If the mode is regional and the model has no blocks that can share a graph.
    """
    if mode == "regional":
        if not hasattr(model, "compile_repeated_blocks"):
            raise ValueError(
                f"compile regional needs blocks that are all alike, unlike {type(model).__name__}'s: use full."
            )
        model.compile_repeated_blocks(fullgraph=True)
    elif mode == "full":
        model.compile()


def find_launcher() -> int | None:
    """Return the process that started this one for `accelerate launch` or torchrun, or `None` if neither did.

    Both set variables for the processes that they start, which they do not have themselves. A shell that has them has
    exported them, and may end before the run that it has started.
    """
    given = [name for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID") if name in os.environ]
    try:
        parent = psutil.Process(os.getppid())
        return parent.pid if any(name not in parent.environ() for name in given) else None
    except psutil.Error:
        return None


#: The launcher as it is imported with this module: it may end while the run is being prepared.
_LAUNCHER = find_launcher()

#: What ends a run early -> the exit code of the process: that of the signal.
STOP_REASONS = {
    "Ctrl-C": 128 + signal.SIGINT,
    "SIGTERM": 128 + signal.SIGTERM,
    "the end of its launcher": 128 + signal.SIGTERM,
}


class Interrupted(SystemExit):
    """The run was told to stop and has saved a checkpoint.

    Args:
        reason: A key of `STOP_REASONS`, which decides the exit code.
    """

    def __init__(self, reason: str):
        super().__init__(STOP_REASONS[reason])


class StopRequest:
    """Notice, while it is entered, what asks the process to end, instead of ending it.

    That is SIGTERM, which schedulers of clusters send before they take the machine back; Ctrl-C; and the end of
    `accelerate launch` or torchrun, which may leave the processes that they started behind. A second Ctrl-C raises
    `KeyboardInterrupt`.

    Args:
        announce: Whether to say after Ctrl-C that the run goes on for a moment.
    """

    def __init__(self, announce: bool = False):
        self._announce, self._received, self._process = announce, "", os.getpid()
        self._previous: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """What asks to end, a key of `STOP_REASONS`, or `None`."""
        if not self._received and _LAUNCHER is not None and os.getppid() != _LAUNCHER:
            self._received = "the end of its launcher"
        return self._received or None

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; in other threads, such as a notebook's, the signal acts as before.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as shells have it for SIGINT in the background
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, signum, frame):
        if signum == signal.SIGINT and self._received == "Ctrl-C":
            raise KeyboardInterrupt
        self._received = "SIGTERM" if signum == signal.SIGTERM else "Ctrl-C"
        if signum == signal.SIGINT and self._announce and os.getpid() == self._process:  # not in a forked worker
            with contextlib.suppress(OSError):
                # Unlike print, this may interrupt a print.
                os.write(2, b"\nThe run ends after this step, with a checkpoint. Press Ctrl-C again to end it now.\n")


def shield_worker(worker: int) -> None:
    """Let a loader worker survive the signals that reach all processes: the main one still needs its batches.

    Clusters send SIGTERM to all processes, terminals send them Ctrl-C. The worker still ends when its parent
    terminates it, as torch and multiprocessing do when the parent ends, and when the parent is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A handler in Python does not learn who sent the signal. Without sigtimedwait, as on macOS, any SIGTERM ends it.
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for SIGTERM of the parent, or for its end, and end this process."""
    parent, started_by = multiprocessing.parent_process(), os.getppid()  # not the same with a fork server
    while os.getppid() == started_by:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and parent is not None and received.si_pid == parent.pid:
            break
    os._exit(0)  # without torch's and Python's own ends, which wait for queues that nobody reads
