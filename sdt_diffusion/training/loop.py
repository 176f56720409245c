"""The training loop: one step, from the batch to the checkpoint, in one place."""

import contextlib
import math
import time
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from ..utils.seeding import Draws
from .distributed import STOP_REASONS, Interrupted, StopRequest
from .heads import average_gradients
from .monitor import StepValues
from .optimizer import admit_step
from .run import TrainingRun
from .shards import full_tensor
from .speed import Window


class Loss(Protocol):
    """What `train` minimizes."""

    def __call__(self, model: nn.Module, images: Any, labels: torch.Tensor, draws: Draws, /) -> torch.Tensor:
        """Return the mean loss of a batch, a scalar; all its random numbers come from `draws`."""

    def pop_values(self) -> dict[str, float]:
        """Return what to log besides the loss, over all processes, since the last call; all processes call it."""


class Validation(Protocol):
    """What `train` does every `validation_steps`: pictures, accuracies, held-out losses."""

    def __call__(self, run: TrainingRun) -> dict[str, float]:
        """Evaluate `run.trained_model`, and return what to log; all processes call it."""


def train(run: TrainingRun, loss: Loss, validate: Validation | None = None) -> None:
    """Train to `max_train_steps`.

    Args:
        run: The run, new or resumed.
        loss: What to minimize.
        validate: Called every `validation_steps` and at the end.

    Raises:
        NonFiniteLossError: If too many consecutive steps were skipped.
        CheckpointError: If a checkpoint cannot be written.
        Interrupted: After SIGTERM, Ctrl-C or the launcher's end, when the step under way and its checkpoint are done.
        KeyboardInterrupt: After a second Ctrl-C.
    """
    config, accelerator, model = run.config, run.accelerator, run.model
    window, values, batches = Window(), StepValues(accelerator.device), run.batches()
    first_step, last_step = run.step, config.run.max_train_steps
    max_norm = config.optimization.max_grad_norm or math.inf
    progress_bar = tqdm(
        total=last_step, initial=run.step, desc="Training", unit="step", disable=not accelerator.is_local_main_process
    )
    with progress_bar, StopRequest(announce=accelerator.is_local_main_process) as stop_request:
        if validate is not None and _validation_is_missing(run):
            _validate(run, validate)
        while run.step < last_step:
            window.resume()
            model.train()
            run.batch_norms.remember()
            losses = []
            for batch in range(config.run.gradient_accumulation_steps):
                images, labels = next(batches)  # (B, ...), (B,)
                draws = run.draws(batch)
                with accelerator.accumulate(model):  # processes exchange gradients in the last batch
                    batch_loss = loss(model, images, labels, draws)
                    accelerator.backward(batch_loss)
                losses.append(batch_loss.detach().float())

            average_gradients(run.heads, accelerator)
            parameters = [*model.parameters(), *run.heads.parameters()]
            gradient_norm = full_tensor(accelerator.clip_grad_norm_(parameters, max_norm))
            means = run.mean_over_processes(losses, gradient_norm, stop_request.reason)  # (2 + reasons to stop,)
            finite = means[:2].isfinite().all()  # stays on the device, as does all that depends on it

            run.set_learning_rates(run.step)
            admit_step(run.state.optimizer, finite)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.batch_norms.settle(finite)
            run.step += 1
            for average in run.averages.values():
                average.update(run.step)

            values.put(run.step, means)
            stop = _count_steps(run, window, values, everything=run.step == first_step + 1 or _something_is_due(run))
            if run.step == first_step + 1:
                run.claim_folder()
            stop = stop if run.step < last_step else None
            if stop:
                _count_steps(run, window, values, everything=True)
                progress_bar.disable = True  # a pipe whose reader the same Ctrl-C has ended, such as tee, would raise

            window.pause()
            progress_bar.update()
            if run.is_due(config.run.logging_steps):
                record = run.pop_window(window) | loss.pop_values()
                run.record(record)
                progress_bar.set_postfix_str(_summary(record))

            if validate is not None and not stop and run.is_due(config.validation_steps):
                _validate(run, validate)

            if stop or run.is_due(config.run.checkpointing_steps):
                run.save_checkpoint()
            if config.ema.ema_snapshot_steps and run.is_due(config.ema.ema_snapshot_steps):
                run.save_snapshots()

            if stop:
                with contextlib.suppress(BrokenPipeError):
                    accelerator.print(
                        f"Stopped by {stop} after step {run.step}, which checkpoint-{run.step} holds. Continue with "
                        "resume_from_checkpoint latest.",
                        flush=True,
                    )
                run.finish()
                raise Interrupted(stop)
    run.gather()


def _something_is_due(run: TrainingRun) -> bool:
    """Return whether this step ends with something that has to know whether it was made."""
    config = run.config
    intervals = (config.run.logging_steps, config.run.checkpointing_steps, config.validation_steps)
    return any(map(run.is_due, (*intervals, config.ema.ema_snapshot_steps)))


def _count_steps(run: TrainingRun, window: Window, values: StepValues, everything: bool) -> str | None:
    """Count the steps whose values are read by now, and return why to stop, if a process was told to in one of them.

    All processes read the same values after the same step.

    Raises:
        NonFiniteLossError: If too many consecutive steps were skipped.
    """
    stop = None
    for step, (loss, norm, *told) in values.pop(everything):
        run.guard.count(step, loss, norm)
        window.add(loss, norm)
        stop = next((reason for reason, share in zip(STOP_REASONS, told, strict=True) if share), stop)
    return stop


def _summary(record: dict[str, float]) -> str:
    """Describe a record in the progress bar."""
    words = [f"loss {record.get('loss', math.nan):.4f}", f"{record['images_per_second']:.0f} images/s"]
    if "mfu" in record:
        words.append(f"MFU {record['mfu']:.0%}")
    return ", ".join([*words, f"{record['memory_gib']:.1f} GiB"])


def _validate(run: TrainingRun, validate: Validation) -> None:
    started = time.perf_counter()
    run.gather()
    run.trained_model.eval()
    values = validate(run)
    run.record({**values, "validation_seconds": time.perf_counter() - started})


def _validation_is_missing(run: TrainingRun) -> bool:
    """Return whether the step that a run starts from still needs validation, because the run was killed before it."""
    due = run.is_due(run.config.validation_steps) if run.step else run.config.validate_first
    missing = due and not run.log.has(run.step, "validation_seconds")
    return bool(run.accelerator.reduce(torch.tensor(float(missing), device=run.accelerator.device), "sum"))
