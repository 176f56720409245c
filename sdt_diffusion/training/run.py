"""The training loop."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..command_line import merged
from ..data import DataArguments, ShuffledStream
from ..files import write_atomically
from .arguments import OptimizationArguments, RunArguments
from .checkpoint import (
    check_output_dir,
    check_same_run,
    find_checkpoint,
    read_manifest,
    save_checkpoint,
    write_config,
)
from .ema import ModelEMA
from .log import TrainingLog
from .optimizer import build_lr_scheduler, build_optimizer

#: Steps in a row that fp16's gradient scaler may skip.
MAX_SKIPPED_STEPS = 50


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the step was not made."""


class Training:
    """One run: prepares everything under accelerate, resumes, and trains.

    Every random draw of a step (noise, timesteps, dropped labels and paths, mixing) follows from the seed, the process
    and the step, and every sample, with its augmentation, from its position in the stream. So weights, optimizer,
    schedule and average are all the state there is, and a run killed anywhere and resumed ends with the same weights.

    Args:
        model: The model to train; has `save_pretrained` and `from_pretrained`.
        name: Its folder in a checkpoint; the averaged model lies in `<name>_ema`.
        compute_loss: Function of (model, images, labels), giving a scalar.
        images: The data set, see `ShuffledStream`.
        run: Length, place and pace.
        optimization: How to optimise.
        data: Workers of the data.
        arguments: All dataclasses of arguments of the script, to be kept beside the run.
        augment: See `ShuffledStream`.
        num_repeats: See `ShuffledStream`.
        parameter_groups: See `build_optimizer`.

    Raises:
        ValueError: If the output folder or the checkpoint is another run's, or the checkpoint is not usable.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        compute_loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor],
        images: Any,
        run: RunArguments,
        optimization: OptimizationArguments,
        data: DataArguments,
        arguments: Sequence[Any],
        augment: Callable[[Any, int], torch.Tensor] | None = None,
        num_repeats: int = 1,
        parameter_groups: Sequence[dict[str, Any]] | None = None,
    ):
        self.name, self.compute_loss, self.images = name, compute_loss, images
        self.augment, self.num_repeats = augment, num_repeats
        self.run, self.optimization, self.data = run, optimization, data
        self.output_dir = Path(run.output_dir)
        self.accelerator = build_accelerator(run)
        run.mixed_precision = self.accelerator.mixed_precision
        self.config = merged(*arguments)
        # A step of more processes sees other images, with other noise.
        self.checkpoint_config = {**self.config, "num_processes": self.accelerator.num_processes}

        resume = run.resume_from_checkpoint is not None
        check_output_dir(self.output_dir, self.config, resume)
        checkpoint = find_checkpoint(self.output_dir, run.resume_from_checkpoint) if resume else None
        if checkpoint is not None:
            check_same_run(str(checkpoint), read_manifest(checkpoint)["config"], self.checkpoint_config)
        elif resume:
            self.accelerator.print(f"There is no checkpoint in {self.output_dir} yet: starting from the beginning.")

        self.ema = ModelEMA(model, optimization, self.accelerator.device) if optimization.use_ema else None
        self.optimizer = build_optimizer(model, optimization, parameter_groups)
        self.lr_scheduler = build_lr_scheduler(
            self.optimizer, optimization, run.max_train_steps, self.accelerator.num_processes
        )
        self.model, self.optimizer, self.lr_scheduler = self.accelerator.prepare(
            model, self.optimizer, self.lr_scheduler
        )
        self.accelerator.register_save_state_pre_hook(self._save_models)
        self.accelerator.register_load_state_pre_hook(self._load_models)

        self.step, self.skipped_steps = 0, 0
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
            self.step = read_manifest(checkpoint)["step"]
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
    def trained_model(self) -> nn.Module:
        """What the run is for: the averaged model, or without an average the model itself."""
        return self.unwrapped_model if self.ema is None else self.ema.model

    @property
    def images_per_step(self) -> int:
        """Images of an optimizer step, over all processes."""
        return self.run.train_batch_size * self.run.gradient_accumulation_steps * self.accelerator.num_processes

    def steps(self) -> Iterator[int]:
        """Trains to `max_train_steps`, yielding the steps done after each one (and its checkpoint, if one was due)."""
        run, accelerator = self.run, self.accelerator
        progress_bar = tqdm(
            total=run.max_train_steps,
            initial=self.step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        losses, seconds, since, window_start = [], 0.0, time.perf_counter(), self.step
        first_step = self.step
        self.model.train()
        for index, (images, labels) in enumerate(self._batches(), self.step * run.gradient_accumulation_steps):
            seed_batch(run.seed, accelerator.process_index, index)
            with accelerator.accumulate(self.model):
                loss = self.compute_loss(self.model, images, labels)
                accelerator.backward(loss)
                losses.append(accelerator.reduce(loss.detach().float(), "mean").item())
                self._check_finite(losses[-1], "loss")
                if accelerator.sync_gradients:
                    norm = self._clip_gradients()
                self.optimizer.step()
                self.lr_scheduler.step()
                self.optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue

            if self.step == first_step and accelerator.is_main_process:
                write_config(self.output_dir, self.config)
            self.step += 1
            self._average_statistics()
            if self.ema is not None:
                self.ema.step(self.unwrapped_model, self.step)
            progress_bar.update()
            seconds += time.perf_counter() - since  # without checkpoints and what the caller does
            last = self.step == run.max_train_steps
            if self.step % run.logging_steps == 0 or last:
                record = {
                    "loss": sum(losses) / len(losses),
                    "grad_norm": norm,
                    "learning_rate": max(self.lr_scheduler.get_last_lr()),  # layer decay lowers others
                    "images_per_second": (self.step - window_start) * self.images_per_step / seconds,
                }
                self.record(record)
                progress_bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['images_per_second']:.0f} images/s")
                losses, seconds, window_start = [], 0.0, self.step
            if last or (run.checkpointing_steps and self.step % run.checkpointing_steps == 0):
                self.save_checkpoint()
            yield self.step
            self.model.train()
            since = time.perf_counter()
        progress_bar.close()

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-<step>`, all or nothing."""
        save_checkpoint(
            self.output_dir,
            self.step,
            self.accelerator.save_state,
            self.run.checkpoints_total_limit,
            self.checkpoint_config,
            self.accelerator.is_main_process,
            self.accelerator.wait_for_everyone,
        )

    def save_picture(self, name: str, make: Callable[[], Image.Image]) -> None:
        """Makes a picture on the main process, saves it in the run's folder and shows it to the trackers."""
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
        )
        return self.accelerator.prepare_data_loader(loader)

    def _average_statistics(self) -> None:
        """Makes the statistics of batch norms those of all processes: only one of them saves the model."""
        if self.accelerator.num_processes == 1:
            return
        for module in self.unwrapped_model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                for statistic in (module.running_mean, module.running_var):
                    statistic.copy_(self.accelerator.reduce(statistic, "mean"))

    def _clip_gradients(self) -> float:
        """Clips, and returns the norm before; stops the run if it will not become finite again."""
        max_norm = self.optimization.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm))
        self.skipped_steps = 0 if math.isfinite(norm) else self.skipped_steps + 1
        # fp16's scaler skips such a step and lowers its scale; it needs a few to find it, but not without end.
        if self.accelerator.scaler is None or self.skipped_steps >= MAX_SKIPPED_STEPS:
            self._check_finite(norm, "gradient norm")
        return norm

    def _check_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"The {what} is {value} at step {self.step + 1}; training stopped before that step changed the "
                "weights. The last checkpoint is sound. What helps: a lower --learning_rate or --max_grad_norm, "
                "--mixed_precision no, for generation --qk_norm rms_norm; each of them is another run, with its own "
                "--output_dir."
            )

    def _save_models(self, models, weights, folder):
        for name, module in self._named_models().items():
            module.save_pretrained(Path(folder) / name, is_main_process=self.accelerator.is_main_process)
        weights.clear()  # accelerate need not save them again

    def _load_models(self, models, folder):
        for name, module in self._named_models().items():
            module.load_state_dict(type(module).from_pretrained(Path(folder) / name).state_dict())
        models.clear()

    def _named_models(self):
        ema = {} if self.ema is None else {f"{self.name}_ema": self.ema.model}
        return {self.name: self.unwrapped_model, **ema}


def build_accelerator(run: RunArguments) -> Accelerator:
    """Accelerate, as the arguments and `accelerate launch` want it."""
    if run.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    logging_dir = Path(run.output_dir) / run.logging_dir
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        log_with=None if run.report_to == "none" else run.report_to,
        project_config=ProjectConfiguration(project_dir=run.output_dir, logging_dir=str(logging_dir)),
    )
    if accelerator.device.type == "cpu":  # `accelerate launch` asks for one thread, however many cores there are
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(run.cpu_threads or max(1, cores // local_processes))
    return accelerator


def seed_batch(seed: int, process: int, index: int) -> None:
    """Seeds torch, and NumPy for timm's mixing, for one batch of one process."""
    state = int(np.random.SeedSequence([seed, process, index]).generate_state(1, np.uint64)[0])
    torch.manual_seed(state)
    np.random.seed(state % 2**32)
