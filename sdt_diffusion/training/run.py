"""Prepare a run for the training loop: processes, model, optimizer, averages, folder, log, and resuming."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader

from ..attention_processor import describe_backend
from ..data import ShuffledStream
from ..hub import HubArguments, command_of, describe_run, share_run
from ..utils.arguments import one_line
from ..utils.files import FolderLock, write_atomically
from ..utils.seeding import SEED_STREAMS_VERSION, Draws, Stream, seed_global_generators
from .checkpoint import (
    MANIFEST_FILE,
    CheckpointError,
    check_output_dir,
    check_same_run,
    complete_checkpoints,
    find_shared_checkpoint,
    is_complete,
    read_changes,
    read_manifest,
    save_checkpoint,
    step_of,
    write_config,
)
from .config import TrainingConfig, TrainingSet
from .distributed import STOP_REASONS, build_accelerator, compile_model, prepare, shield_worker
from .ema import WeightAverage, ema_profiles
from .heads import prepare_heads
from .monitor import FiniteGuard, TrainingLog
from .optimizer import build_lr_schedule, build_optimizer
from .reconstruct_ema import drop_snapshots_after, save_snapshot
from .speed import Window, Work, memory_gib, peak_tflops
from .state import BatchNormStatistics, TrainingState, gather


class TrainingRun:
    """Everything that `train` needs.

    Every random draw of a step follows from the seed, the step and the image's place in it, and every sample, with its
    augmentation, from its position in the stream. So weights, moments and averages are the entire state: a run that is
    killed at any time and resumed ends with the same weights, and any number of processes whose steps have as
    many images gives the same weights up to rounding. Only dropout, drop path and mixup differ between processes.

    Args:
        model: The model to train; has `save_pretrained` and `from_pretrained`.
        name: Its folder in a checkpoint; averages lie in `<name>_ema...`.
        data: The training data.
        config: Everything else, resolved.
        parameter_groups: See `build_optimizer`.
        heads: What the loss trains with the model, see `DiffusionLoss`.

    Attributes:
        step: Optimizer steps made.
        model: The model that is trained, wrapped by accelerate.
        trained_model: The complete model that the run saves: the first average, or the trained weights without one.

    As a context manager, it gives the folder free at the end, and names the last checkpoint in errors of the disk.

    Raises:
        ValueError: If the output folder or the checkpoint belongs to another run, the checkpoint is not usable,
            another process writes to the folder, or the tracker cannot start.
        OSError: If nothing can be written to the output folder.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        data: TrainingSet,
        config: TrainingConfig,
        parameter_groups: Sequence[dict[str, Any]] | None = None,
        heads: nn.ModuleDict | None = None,
    ):
        self.data, self.config, self.output_dir = data, config, config.output_dir
        self.accelerator = build_accelerator(config.run)
        self.images_per_step = (
            config.run.train_batch_size * config.run.gradient_accumulation_steps * self.accelerator.num_processes
        )
        device, precision = self.accelerator.device, self.accelerator.mixed_precision
        peak = config.run.peak_tflops or peak_tflops(device, precision, config.run.allow_tf32)
        self.work = Work(self.images_per_step, self.accelerator.num_processes, config.flops_per_image, peak)
        # Steps depend on these as well.
        self.checkpoint_config = {
            **config.as_dict(),
            **data.identity,
            "train_batch_size * gradient_accumulation_steps * processes": self.images_per_step,
            "images of the data set": len(data.images),
            "seed_streams": SEED_STREAMS_VERSION,
        }
        self.step, self.guard = 0, FiniteGuard(config.run.max_skipped_steps)
        self._lock, self._new_folders = FolderLock(self.output_dir), list[Path]()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.release_folder)
            self._lock_folder()
            checkpoint, self.changes = self._find_checkpoint()
            self._prepare(model, name, parameter_groups, heads or nn.ModuleDict())
            if checkpoint is not None:
                self._load_checkpoint(checkpoint)
                self.accelerator.print(f"Resumed from {checkpoint}, after step {self.step}.")
            if self.accelerator.is_main_process:
                self.state.check_space(config, self.step)
            self.log = TrainingLog(self.output_dir, self.step)
            self._start_trackers()
            self.accelerator.print(self.describe())
            self.accelerator.wait_for_everyone()  # all must have checked the folder before the first step marks it
            on_error.pop_all()

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the folder; name the last checkpoint in errors of files, and of gloo and NCCL for a lost process."""
        self.release_folder()
        lost = isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
        of_files = isinstance(error, (OSError, SafetensorError)) and not isinstance(error, CheckpointError)
        if error is not None and (lost or of_files):
            complete = complete_checkpoints(self.output_dir)
            last = f"{complete[-1]} is complete: continue with resume_from_checkpoint latest" if complete else ""
            raise OSError(f"{one_line(error).rstrip('.')}. {last or 'There is no checkpoint yet'}.") from error

    @property
    def unwrapped_model(self) -> nn.Module:
        """The trained model without the wrappers of DDP or torch.compile."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def describe(self) -> str:
        """Return a line on processes, device, precision, parameters, batch and length."""
        run, parameters = self.config.run, list(self.unwrapped_model.parameters())
        device = self.accelerator.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} thread(s)"
        precision = "fp32" if self.accelerator.mixed_precision == "no" else self.accelerator.mixed_precision
        how = precision if run.compile == "none" else f"{precision}, compiled ({run.compile})"
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        if backend := describe_backend(self.unwrapped_model, device, dtype):
            how += f", attention by {backend}"
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return (
            f"{self.accelerator.num_processes} process(es) on {device.type} ({where}), {how}; "
            f"{trained:,} trained of {sum(p.numel() for p in parameters):,} parameters; "
            f"{len(self.data.images):,} images, {self.images_per_step:,} a step ({run.train_batch_size} x "
            f"{run.gradient_accumulation_steps} a process); step {self.step:,} of {run.max_train_steps:,}."
        )

    def batches(self) -> Iterator[tuple[Any, torch.Tensor]]:
        """Load the batches of this process, on its device, from the position reached to the end of the run."""
        run = self.config.run
        stream = ShuffledStream(
            self.data.images,
            run.seed,
            self.data.augment,
            start=self.step * self.images_per_step,
            stop=run.max_train_steps * self.images_per_step,
            num_repeats=self.data.num_repeats,
            class_balanced=self.data.class_balanced,
        )
        if len(stream) == 0:
            return iter(())
        loader = DataLoader(
            stream,
            batch_size=run.train_batch_size,
            num_workers=self.data.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=shield_worker,
        )
        return iter(self.accelerator.prepare_data_loader(loader))

    def draws(self, batch: int) -> Draws:
        """Return the random numbers of the step's batch number `batch`, and seed dropout, drop path and mixup.

        accelerate deals batches to the processes in turn.
        """
        run, accelerator = self.config.run, self.accelerator
        first = (batch * accelerator.num_processes + accelerator.process_index) * run.train_batch_size
        seed_global_generators(Stream.BATCH, run.seed, self.step * self.images_per_step + first)
        rows = slice(first, first + run.train_batch_size)
        return Draws(run.seed, self.step, rows, self.images_per_step, accelerator.device)

    def mean_over_processes(self, losses: list[torch.Tensor], norm: torch.Tensor, stop: str | None) -> torch.Tensor:
        """Return the mean loss, the gradient norm, and for each of `STOP_REASONS` the share of processes told it."""
        loss = torch.stack(losses).mean()
        told = [torch.full_like(loss, reason == stop) for reason in STOP_REASONS]
        return self.accelerator.reduce(torch.stack([loss, norm.to(loss), *told]), "mean")

    def is_due(self, interval: int) -> bool:
        """Return whether something done every `interval` steps (0 for never) and at the end is to be done now."""
        return bool(interval and self.step % interval == 0) or self.step == self.config.run.max_train_steps

    def claim_folder(self) -> None:
        """Mark the folder as this run's; called at the first step, so that bad input leaves nothing behind."""
        if self.accelerator.is_main_process:
            write_config(self.output_dir, self.config.as_dict(), self.changes)

    def release_folder(self) -> None:
        """Let other runs write to the folder, and remove it if this run has made it and written nothing there."""
        self._lock.release()
        for folder in self._new_folders:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()

    def gather(self) -> None:
        """Bring `trained_model` up to date where FSDP2 shards the weights; all processes call it."""
        if self.accelerator.is_fsdp2:
            averages = list(self.averages.values())
            tensors = averages[0].tensors if averages else self.unwrapped_model.state_dict()
            self.trained_model.load_state_dict(gather(tensors))

    def save_checkpoint(self) -> None:
        """Write `checkpoint-<step>`, all or nothing, and the snapshots of averages that are due."""
        scaler = self.accelerator.scaler
        save_checkpoint(
            self.output_dir,
            self.step,
            lambda folder: self.state.save(folder, self.accelerator.is_main_process),
            self.config.run.checkpoints_total_limit,
            self.checkpoint_config,
            {"guard": self.guard.state_dict(), "scaler": scaler and scaler.state_dict()},
            self.accelerator.is_main_process,
            self.accelerator.wait_for_everyone,
        )

    def save_snapshots(self) -> None:
        """Store the power averages, from which others can be reconstructed."""
        for sigma_rel, average in zip(self.config.ema.ema_sigma_rel, self.averages.values(), strict=True):
            name = f"the average of sigma_rel {sigma_rel:g}"
            tensors = gather(average.tensors, keep=self.accelerator.is_main_process, require_finite=name)
            if self.accelerator.is_main_process:
                save_snapshot(self.output_dir, self.step, sigma_rel, tensors)

    def record(self, values: dict[str, float]) -> None:
        """Write values of the step reached to the run's log and the trackers."""
        try:
            self.accelerator.log(values, step=self.step)
        except Exception as error:  # every tracker raises its own
            raise OSError(f"report_to {self.config.run.report_to} takes no values: {one_line(error)}") from error
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.log.append({"step": self.step, **values})

    def pop_window(self, window: Window) -> dict[str, float]:
        """Return loss, gradient norm, learning rate and speed since the last record, and start the window anew."""
        values = {
            **window.means(),
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),  # lower with layer decay
            "epoch": self.step * self.images_per_step / (len(self.data.images) * self.data.num_repeats),
            **self.work.speed(window.seconds_per_step),
            "memory_gib": memory_gib(self.accelerator.device),
            "elapsed_seconds": window.elapsed,
            "seconds_left": (self.config.run.max_train_steps - self.step) * window.seconds_per_step,
        }
        if self.guard.skipped:
            values["skipped_steps"] = self.guard.skipped
        window.reset()
        return values

    def save_picture(self, name: str, picture: Image.Image) -> None:
        """Save a picture in the run's folder and show it to the trackers; the main process calls it."""
        path = self.output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, picture.save)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(picture)[None]}, step=self.step, **layout)

    def share(self, args: HubArguments, script: str, given: Mapping[str, Any], networks: Sequence[nn.Module]) -> None:
        """Write the run's record and model card, and push the model if asked to; all processes call it at the end.

        Args:
            args: Whether and where to push.
            script: The script, such as train/train_dit.py.
            given: What its command line has set; see `given_arguments`.
            networks: What is saved: the trained network, and others that sampling needs.
        """
        if self.accelerator.is_main_process:
            num_processes = self.accelerator.num_processes
            command = command_of(script, given, num_processes)
            images, length = self.data.images, (self.step, self.images_per_step)
            record = describe_run(command, self.config.as_dict(), images, networks, *length, num_processes)
            share_run(args, self.output_dir, record)

    def finish(self) -> None:
        """Close the trackers and the process group, on all processes at once, after removing DDP's wrapper."""
        self.accelerator.wait_for_everyone()
        self.model = self.unwrapped_model
        self.accelerator.free_memory()
        self.accelerator.end_training()
        self.release_folder()

    def _lock_folder(self):
        if self.accelerator.is_main_process:
            folders = (self.output_dir, *self.output_dir.parents)
            self._new_folders = [folder for folder in folders if not folder.exists()]
            self._lock.acquire()

    def _start_trackers(self):
        scalars = {key: value for key, value in self.config.as_dict().items() if isinstance(value, (int, float, str))}
        try:
            self.accelerator.init_trackers("sdt_diffusion", config=scalars)
        except Exception as error:  # every tracker raises its own
            raise ValueError(
                f"report_to {self.config.run.report_to} cannot start: {one_line(error)}. Correct this, or set "
                "report_to none."
            ) from error

    def _find_checkpoint(self):
        """Return the checkpoint to resume from, or `None`, and the changes to the run's arguments so far.

        Runs that cannot be resumed are refused before anything is written.
        """
        run, resume = self.config.run, self.config.run.resume_from_checkpoint is not None
        known = self.config.as_dict()
        for key in run.change_on_resume:
            if key not in self.checkpoint_config or not resume:
                need = "resume_from_checkpoint" if key in self.checkpoint_config else "an argument of this script"
                raise ValueError(f"change_on_resume {key} needs {need}.")
        may_differ = {*self.config.resumable(), *self.data.relocatable}
        check_output_dir(self.output_dir, known, resume, may_differ, run.change_on_resume)
        checkpoint, wanted = None, run.resume_from_checkpoint or "latest"
        if resume:
            checkpoint = find_shared_checkpoint(self.output_dir, wanted, self.accelerator.is_main_process)
        seen = gather_object([str(checkpoint if checkpoint is not None and is_complete(checkpoint) else None)])
        if len(set(seen)) > 1:
            raise ValueError(
                f"The processes see different checkpoints in {self.output_dir} ({', '.join(seen)}): it must lie on a "
                "disk that all of them share."
            )
        if checkpoint is None:
            if resume:
                self.accelerator.print(f"There is no checkpoint in {self.output_dir} yet: starting at the beginning.")
            return None, []
        manifest = read_manifest(checkpoint)
        changed = check_same_run(
            str(checkpoint), manifest["config"], self.checkpoint_config, may_differ, run.change_on_resume
        )
        if manifest["step"] > run.max_train_steps:
            raise ValueError(
                f"{checkpoint} is later than max_train_steps {run.max_train_steps}: there is nothing left to do."
            )
        later = [path.name for path in complete_checkpoints(self.output_dir) if step_of(path) > manifest["step"]]
        if later and wanted != "latest":  # after the latest sound one there are only damaged ones
            raise ValueError(
                f"{self.output_dir} also holds {', '.join(later)}, later than {checkpoint}: move them away, or resume "
                "from the latest. Two histories of a run in one folder would be mixed up."
            )
        changes = [change for change in read_changes(self.output_dir) if change["step"] <= manifest["step"]]
        return checkpoint, changes + [{"step": manifest["step"], **change} for change in changed]

    def _prepare(self, model, name, parameter_groups, heads):
        config, accelerator = self.config, self.accelerator
        optimizer = build_optimizer(model, config.optimization, parameter_groups, accelerator.mixed_precision)
        skeleton = copy.deepcopy(model).to("meta")
        separate = None  # without an average, the trained model is the one that is saved
        if config.ema.use_ema or accelerator.is_fsdp2:
            separate = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
        compile_model(model, config.run.compile)
        self.model, self.optimizer = prepare(accelerator, model, optimizer)
        self.heads = prepare_heads(heads, optimizer, config.optimization, accelerator)
        self.set_learning_rates = build_lr_schedule(optimizer, config.optimization, config.run.max_train_steps)
        self.batch_norms = BatchNormStatistics(self.unwrapped_model, accelerator.num_processes)
        tensors = self.unwrapped_model.state_dict()
        profiles = ema_profiles(config.ema)
        self.averages = {suffix: WeightAverage(tensors, profile) for suffix, profile in profiles.items()}
        self.state = TrainingState(name, skeleton, self.unwrapped_model, optimizer, self.averages, self.heads)
        if separate is not None and self.averages and not accelerator.is_fsdp2:
            separate.load_state_dict(next(iter(self.averages.values())).tensors, assign=True)  # shares its memory
            separate.requires_grad_(False)
        self.trained_model = self.unwrapped_model if separate is None else separate

    def _load_checkpoint(self, checkpoint):
        manifest = read_manifest(checkpoint)
        self.state.load(checkpoint)
        try:
            self.guard.load_state_dict(manifest["state"]["guard"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(manifest["state"]["scaler"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # the last from torch's scaler
            raise ValueError(
                f"{checkpoint / MANIFEST_FILE} is damaged: its state does not fit ({error!r})."
            ) from error
        self.step = manifest["step"]
        self.gather()
        if self.accelerator.is_main_process:
            drop_snapshots_after(self.output_dir, self.step)
        if self.config.ema.ema_snapshot_steps and self.is_due(self.config.ema.ema_snapshot_steps):
            self.save_snapshots()  # the run may have been killed after the checkpoint and before them
