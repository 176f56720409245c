"""The training loop."""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import DataArguments, ShuffledStream
from ..utils.arguments import merged
from ..utils.files import FolderLock, write_atomically
from ..utils.seeding import Draws, Stream, seed_global_generators
from .checkpoint import (
    check_output_dir,
    check_same_run,
    complete_checkpoints,
    find_checkpoint,
    read_manifest,
    save_checkpoint,
    step_of,
    write_config,
)
from .config import OptimizationArguments, RunArguments
from .distributed import Interrupted, StopRequest, build_accelerator, ignore_in_worker, prepare, whole
from .ema import WeightAverage, drop_snapshots_after, profiles, save_snapshot
from .monitor import FiniteGuard, TrainingLog, Window
from .optimizer import build_lr_schedule, build_optimizer
from .state import RunningStatistics, TrainingState, gather


class Training:
    """One run: prepares everything under accelerate, resumes, and trains.

    Every random draw of a step follows from the seed, the step and the image's place in it, and every sample, with its
    augmentation, from its position in the stream. So weights, moments and averages are all the state there is: a run
    killed anywhere and resumed ends with the same weights, and any number of processes that makes steps of as many
    images goes the same way, up to rounding. Only dropout, dropped paths and mixed images differ between processes.

    Args:
        model: The model to train; has `save_pretrained` and `from_pretrained`.
        name: Its folder in a checkpoint; averaged models lie in `<name>_ema...`.
        compute_loss: Function of (model, images, labels, draws), giving a scalar; see `Draws`.
        images: The data set, see `ShuffledStream`.
        run: Length, place and pace.
        optimization: How to optimise.
        data: Workers of the data.
        arguments: All dataclasses of arguments of the script, to be kept beside the run.
        augment: See `ShuffledStream`.
        num_repeats: See `ShuffledStream`.
        parameter_groups: See `build_optimizer`.
        further_values: Function of a sum over all processes, giving values to log beside the loss, of the steps since
            it was last called; all processes call it.

        identity: What steps depend on besides the arguments, such as fingerprints of data; kept in checkpoints.
        named_by_identity: Arguments that are paths to what `identity` tells apart, and may be others on resuming.

    Raises:
        ValueError: If the output folder or the checkpoint is another run's, the checkpoint is not usable, or another
            process writes to the folder.
        OSError: If nothing can be written to the output folder.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        compute_loss: Callable[[nn.Module, torch.Tensor, torch.Tensor, Draws], torch.Tensor],
        images: Any,
        run: RunArguments,
        optimization: OptimizationArguments,
        data: DataArguments,
        arguments: Sequence[Any],
        augment: Callable[[Any, int], torch.Tensor] | None = None,
        num_repeats: int = 1,
        parameter_groups: Sequence[dict[str, Any]] | None = None,
        further_values: Callable[[Callable[[torch.Tensor], torch.Tensor]], dict[str, float]] | None = None,
        identity: Mapping[str, Any] | None = None,
        named_by_identity: Collection[str] = (),
    ):
        self.compute_loss, self.images, self.further_values = compute_loss, images, further_values
        self.augment, self.num_repeats = augment, num_repeats
        self.run, self.optimization, self.data = run, optimization, data
        self.output_dir = Path(run.output_dir)
        self.accelerator = build_accelerator(run)
        self.config = merged(*arguments)
        # What a step sees follows from these as well.
        self.checkpoint_config = {
            **self.config,
            **(identity or {}),
            "train_batch_size * gradient_accumulation_steps * processes": self.images_per_step,
            "images of the data set": len(images),
        }
        checkpoint = self._find_checkpoint(named_by_identity)
        self._lock = FolderLock(self.output_dir)
        if self.accelerator.is_main_process and self.output_dir.exists():  # else the first step makes it
            self._lock.acquire()

        self.guard = FiniteGuard(run.max_skipped_steps)
        self.step = 0
        self._prepare(model, name, parameter_groups)
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
            self.accelerator.print(f"Resumed from {checkpoint}, after step {self.step}.")
        self.log = TrainingLog(self.output_dir, self.step)
        scalars = {key: value for key, value in self.config.items() if isinstance(value, (int, float, str, bool))}
        self.accelerator.init_trackers("sdt_diffusion", config=scalars)
        self.accelerator.wait_for_everyone()  # nobody looks at the folder when the first step marks it as this run's

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without the wrappers of DDP or torch.compile."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def images_per_step(self) -> int:
        """Images of an optimizer step, over all processes."""
        return self.run.train_batch_size * self.run.gradient_accumulation_steps * self.accelerator.num_processes

    def steps(self) -> Iterator[int]:
        """Trains to `max_train_steps`, yielding the steps done after each one (and its checkpoint, if one was due).

        Raises:
            NonFiniteLossError: See `FiniteGuard`.
            CheckpointError: If a checkpoint cannot be written.
            Interrupted: After SIGTERM, when the step under way and a checkpoint are done.
        """
        run, accelerator = self.run, self.accelerator
        progress_bar = tqdm(
            total=run.max_train_steps,
            initial=self.step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        self.window, losses, first_step = Window(), [], self.step
        self.model.train()
        with StopRequest() as stop_request:
            for index, (images, labels) in enumerate(self._batches()):
                if not losses:
                    self.statistics.keep()
                draws = self._draws(index % run.gradient_accumulation_steps)
                with accelerator.accumulate(self.model):
                    batch_loss = self.compute_loss(self.model, images, labels, draws)
                    accelerator.backward(batch_loss)
                    losses.append(batch_loss.detach().float())
                    if accelerator.sync_gradients:
                        loss, norm, stop = self._make_step(losses, stop_request.received)
                        losses = []
                if not accelerator.sync_gradients:
                    continue

                if self.step == first_step and accelerator.is_main_process:
                    self._lock.acquire()
                    write_config(self.output_dir, self.config)
                self.step += 1
                for average in self.averages.values():
                    average.step(self.step)
                progress_bar.update()
                self.window.add(loss, norm)
                self.window.pause()
                if self._is_due(run.logging_steps):
                    self._record_window(progress_bar)
                if stop or self._is_due(run.checkpointing_steps):
                    self.save_checkpoint()
                self._save_snapshots_if_due()
                if stop and self.step < run.max_train_steps:
                    progress_bar.close()
                    self._interrupt()
                if self.step == run.max_train_steps:
                    self.gather()
                yield self.step
                self.model.train()
                self.window.resume()
        progress_bar.close()

    def gather(self) -> None:
        """Brings `trained_model` up to date where FSDP2 keeps a part of it in each process; all processes call it."""
        if self.accelerator.is_fsdp2:
            tensors = (
                next(iter(self.averages.values())).tensors if self.averages else self.unwrapped_model.state_dict()
            )
            self.trained_model.load_state_dict(gather(tensors))

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-<step>`, all or nothing."""
        scaler = self.accelerator.scaler
        save_checkpoint(
            self.output_dir,
            self.step,
            lambda folder: self.state.save(folder, self.accelerator.is_main_process),
            self.run.checkpoints_total_limit,
            self.checkpoint_config,
            {"guard": self.guard.state_dict(), "scaler": scaler and scaler.state_dict()},
            self.accelerator.is_main_process,
            self.accelerator.wait_for_everyone,
        )

    def save_picture(self, name: str, make: Callable[[], Image.Image]) -> None:
        """Makes a picture on the main process, saves it in the run's folder and shows it to the trackers."""
        self.gather()
        if not self.accelerator.is_main_process:
            return
        picture = make()
        path = self.output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, picture.save)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(picture)[None]}, step=self.step, **layout)

    def record(self, values: dict[str, float]) -> None:
        """Tells the trackers and the run's log of values of the step reached."""
        self.accelerator.log(values, step=self.step)
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.log.append({"step": self.step, **values})

    def finish(self) -> None:
        """Closes the trackers and ends the processes' ties: together, and after DDP, which would outlive them."""
        self.accelerator.wait_for_everyone()
        self.model = self.unwrapped_model
        self.accelerator.free_memory()
        self.accelerator.end_training()
        self._lock.release()

    def _find_checkpoint(self, named_by_identity):
        """The checkpoint to go on from, or `None`; refuses what cannot be gone on from, before anything is written."""
        run, resume = self.run, self.run.resume_from_checkpoint is not None
        check_output_dir(self.output_dir, self.config, resume, named_by_identity)
        checkpoint = find_checkpoint(self.output_dir, run.resume_from_checkpoint) if resume else None
        seen = gather_object([str(checkpoint)])
        if len(set(seen)) > 1:
            raise ValueError(
                f"The processes see different checkpoints in {self.output_dir} ({', '.join(seen)}): it must lie on a "
                "disk that all of them share."
            )
        if checkpoint is None:
            if resume:
                self.accelerator.print(
                    f"There is no checkpoint in {self.output_dir} yet: starting from the beginning."
                )
            return None
        manifest = read_manifest(checkpoint)
        check_same_run(str(checkpoint), manifest["config"], self.checkpoint_config, named_by_identity)
        if manifest["step"] > run.max_train_steps:
            raise ValueError(
                f"{checkpoint} is later than --max_train_steps {run.max_train_steps}: there is nothing left to do."
            )
        later = [path.name for path in complete_checkpoints(self.output_dir) if step_of(path) > manifest["step"]]
        if later:
            raise ValueError(
                f"{self.output_dir} also holds {', '.join(later)}, later than {checkpoint}: move them away, or go on "
                "from the latest. Two histories of a run in one folder would be mixed up."
            )
        return checkpoint

    def _prepare(self, model, name, parameter_groups):
        """Model, optimizer, schedule and averages; `trained_model` is what the run is for, whole and ready for use."""
        optimizer = build_optimizer(model, self.optimization, parameter_groups, self.accelerator.device)
        skeleton = copy.deepcopy(model).to("meta")
        product = None  # without an average, the model that is trained
        if self.optimization.use_ema or self.accelerator.is_fsdp2:
            product = copy.deepcopy(model).to(self.accelerator.device).eval().requires_grad_(False)
        self.model, self.optimizer = prepare(self.accelerator, model, optimizer)
        self.set_learning_rates = build_lr_schedule(optimizer, self.optimization, self.run.max_train_steps)
        self.statistics = RunningStatistics(self.unwrapped_model, self.accelerator.num_processes)
        tensors = self.unwrapped_model.state_dict()
        self.averages = {
            ending: WeightAverage(tensors, profile) for ending, profile in profiles(self.optimization).items()
        }
        self.state = TrainingState(name, skeleton, self.unwrapped_model, optimizer, self.averages)
        if self.averages and not self.accelerator.is_fsdp2:  # the first average lives in the model that is the product
            product.load_state_dict(next(iter(self.averages.values())).tensors, assign=True)
            product.requires_grad_(False)
        self.trained_model = self.unwrapped_model if product is None else product

    def _load_checkpoint(self, checkpoint):
        manifest = read_manifest(checkpoint)
        self.state.load(checkpoint)
        self.guard.load_state_dict(manifest["state"]["guard"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(manifest["state"]["scaler"])
        self.step = manifest["step"]
        self.gather()
        if self.accelerator.is_main_process:
            drop_snapshots_after(self.output_dir, self.step)
        self._save_snapshots_if_due()  # a kill may have come between the checkpoint and them

    def _batches(self):
        """Batches from the position reached to the end of the run, on this process's device."""
        run = self.run
        stream = ShuffledStream(
            self.images,
            run.seed,
            self.augment,
            start=self.step * self.images_per_step,
            stop=run.max_train_steps * self.images_per_step,
            num_repeats=self.num_repeats,
        )
        if len(stream) == 0:
            return []
        loader = DataLoader(
            stream,
            batch_size=run.train_batch_size,
            num_workers=self.data.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=ignore_in_worker,
        )
        return self.accelerator.prepare_data_loader(loader)

    def _draws(self, batch):
        """The random numbers of a batch of this step, as accelerate deals batches to the processes in turn."""
        run, accelerator = self.run, self.accelerator
        first = (batch * accelerator.num_processes + accelerator.process_index) * run.train_batch_size
        seed_global_generators(Stream.BATCH, run.seed, self.step * self.images_per_step + first)
        rows = slice(first, first + run.train_batch_size)
        return Draws(run.seed, self.step, rows, self.images_per_step, accelerator.device)

    def _make_step(self, losses, stop):
        """Clips and steps, unless the guard objects.

        Returns:
            The loss, the gradient's norm before clipping, and whether any process was told to stop.
        """
        max_norm = self.optimization.max_grad_norm or math.inf
        norm = whole(self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm))
        loss = torch.stack(losses).mean()
        values = torch.stack([loss, norm.to(loss), torch.full_like(loss, stop)])
        loss, norm, stop = self.accelerator.reduce(values, "mean").tolist()  # the same in all processes
        self.set_learning_rates(self.step)
        # fp16's scaler leaves such a step out by itself, and lowers its scale when it is asked to make it.
        admitted = self.guard.admits(self.step + 1, loss, norm)
        if admitted or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if admitted:
            self.statistics.average()
        else:
            self.statistics.restore()
        return loss, norm, bool(stop)

    def _is_due(self, interval):
        """Whether something that is done every so many steps, if at all, and at the end, is to be done now."""
        return bool(interval and self.step % interval == 0) or self.step == self.run.max_train_steps

    def _interrupt(self):
        self.accelerator.print(
            f"Stopped by SIGTERM after step {self.step}, which checkpoint-{self.step} holds. Go on with "
            "--resume_from_checkpoint latest."
        )
        self.finish()
        raise Interrupted

    def _record_window(self, progress_bar):
        window, self.window = self.window, Window()
        values = {
            **window.means(),
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),  # layer decay lowers others
            "images_per_second": window.steps * self.images_per_step / window.seconds,
        }
        if self.guard.skipped:
            values["skipped_steps"] = self.guard.skipped
        if self.further_values is not None:
            values |= self.further_values(lambda tensor: self.accelerator.reduce(tensor, "sum"))
        self.record(values)
        shown = [f"{values['images_per_second']:.0f} images/s"]
        if "loss" in values:
            shown.insert(0, f"loss {values['loss']:.4f}")
        progress_bar.set_postfix_str(", ".join(shown))

    def _save_snapshots_if_due(self):
        every = self.optimization.ema_snapshot_steps
        if not (every and self._is_due(every)):
            return
        for sigma_rel, average in zip(self.optimization.ema_sigma_rel, self.averages.values(), strict=True):
            tensors = gather(average.tensors, keep=self.accelerator.is_main_process)
            if self.accelerator.is_main_process:
                save_snapshot(self.output_dir, self.step, sigma_rel, tensors)
