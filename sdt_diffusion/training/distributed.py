"""Processes, devices and precision, as the arguments and `accelerate launch` set them; FSDP2; SIGTERM."""

import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, is_bf16_available, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

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
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.mixed_precision != "no":
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)
    return model, optimizer


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded; all processes must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_full(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        source = source.to(target.device)  # every process has read the whole tensor, so nothing needs to be sent
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)


class Interrupted(SystemExit):
    """The run was told to stop and has saved a checkpoint; ends the process with code 143, as the signal would."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class StopRequest:
    """Remember a SIGTERM that arrives while it is entered, instead of ending the process.

    Schedulers of clusters send it before they take the machine back.
    """

    def __init__(self):
        self.received = False
        self._previous = None

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; in other threads, such as a notebook's, the signal acts as before.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, signum, frame):
        self.received = True


def ignore_sigterm_in_worker(worker: int) -> None:
    """Ignore SIGTERM in a loader worker, which clusters signal too: the main process still needs its batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
