"""Accelerate, as the arguments and `accelerate launch` want it."""

import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, is_bf16_available, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

#: What processes wait for each other: the main one may sample, or write a checkpoint to a slow disk.
PATIENCE = timedelta(hours=2)


def process_state() -> PartialState:
    """The processes, before there is an accelerator, which will find them as they are."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


def build_accelerator(run: Any) -> Accelerator:
    """The accelerator of a run; writes the precision that was chosen into `run`."""
    if run.allow_tf32:
        torch.set_float32_matmul_precision("high")
    process_state()
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision or default_precision(),
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        log_with=None if run.report_to == "none" else run.report_to,
        project_config=ProjectConfiguration(
            project_dir=run.output_dir, logging_dir=str(Path(run.output_dir) / run.logging_dir)
        ),
    )
    run.mixed_precision = accelerator.mixed_precision
    if accelerator.device.type == "cpu":  # `accelerate launch` asks for one thread, however many cores there are
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(run.cpu_threads or max(1, cores // local_processes))
    return accelerator


def default_precision() -> str | None:
    """bf16 on accelerators that have it; `None`, for what `accelerate launch` says, on others or if it names one.

    Its "no" names none: it is what it says unless it is told otherwise. `--mixed_precision no` is heard.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return None
    device = process_state().device
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return "bf16" if device.type not in ("cpu", "mps") and is_bf16_available() else None


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare`, by which FSDP2 computes in the same precision as DDP: that of autocast.

    FSDP2's own mixed precision would round all that goes into the model too: timesteps to the 8 bits of bf16.
    """
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.mixed_precision != "no":
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)
    return model, optimizer


class Interrupted(SystemExit):
    """The run was asked to stop, and has saved what it had; ends the process like the signal would, by code 143."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class StopRequest:
    """Remembers a SIGTERM that comes while it is entered, instead of dying of it."""

    def __init__(self):
        self.received = False
        self._previous = None

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; elsewhere, as in a notebook's, the signal does what it always did.
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


def ignore_in_worker(worker: int) -> None:
    """Leaves SIGTERM to the main process: clusters send it to a loader's workers too, which must serve on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; all processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        source = source.to(target.device)  # every process has read the whole: none needs sending
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)
