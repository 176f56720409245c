"""The arguments of a run, and the immutable config that training uses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..utils.arguments import fields_with, merged
from ..utils.ranges import CheckedArguments, Range, a_seed, at_least, between, check_value, more_than
from .ema import EMAArguments
from .optimizer import OptimizationArguments

#: A run may be resumed with other values of these fields: they change no step that was already made.
RESUMABLE = {"resumable": True}


@dataclass(frozen=True)
class RunArguments(CheckedArguments):
    """Length, folder, batches and intervals of a run."""

    output_dir: str = field(
        default="outputs/sdt", metadata={"help": "Folder for everything the run writes."} | RESUMABLE
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything random."} | a_seed())
    train_batch_size: int = field(
        default=256,
        # A resumed run may split a step differently, as long as the step has as many images.
        metadata={"help": "Images of a batch on each process."} | RESUMABLE | between(1, 1_000_000),
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Batches of a step."} | RESUMABLE | between(1, 1_000_000)
    )
    max_train_steps: int = field(
        default=400_000,
        metadata={"help": "Optimizer steps in all; a schedule such as cosine ends there."} | RESUMABLE | at_least(1),
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None,
        metadata={"help": "Default: what accelerate is configured for, else bf16 on accelerators that have it."},
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={"help": "Threads of a process on CPU. Default: OMP_NUM_THREADS, else all cores."}
        | RESUMABLE
        | between(1, 1024),
    )
    allow_tf32: bool = field(default=False, metadata={"help": "Use TF32 matrix products on CUDA."})
    compile: Literal["none", "regional", "full"] = field(
        default="none",
        metadata={"help": "torch.compile the blocks, one graph for all of them, or the whole model."} | RESUMABLE,
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "What a device can do at most, for the MFU in the log. Default: that of a known one."}
        | RESUMABLE
        | more_than(0),
    )
    checkpointing_steps: int = field(
        default=5000, metadata={"help": "Steps between checkpoints; 0 for one at the end."} | RESUMABLE | at_least(0)
    )
    checkpoints_total_limit: int | None = field(
        default=None, metadata={"help": "Checkpoints to keep; all by default."} | RESUMABLE | at_least(0)
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'latest', or the path of a checkpoint-N folder."} | RESUMABLE
    )
    change_on_resume: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Arguments, such as learning_rate, that may differ from those of the checkpoint; the change and "
            "its step are recorded."
        }
        | RESUMABLE,
    )
    max_skipped_steps: int = field(
        default=50,
        metadata={"help": "Consecutive steps that may be skipped because loss or gradient are not finite."}
        | RESUMABLE
        | at_least(0),
    )
    logging_steps: int = field(default=10, metadata={"help": "Steps between logged values."} | RESUMABLE | at_least(1))
    report_to: str = field(default="tensorboard", metadata={"help": "A tracker of accelerate, or 'none'."} | RESUMABLE)
    logging_dir: str = field(default="logs", metadata={"help": "The tracker's folder in output_dir."} | RESUMABLE)

    def __post_init__(self):
        super().__post_init__()
        check_tracker(self.report_to)


def check_tracker(name: str) -> None:
    """Refuse a tracker that accelerate would skip with a warning, leaving the run untracked.

    Raises:
        ValueError: If there is no such tracker, or its package is not installed.
    """
    if name == "none":
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"report_to must be 'none' or one of {', '.join(LOGGER_TYPE_TO_CLASS)}, not {name!r}.")
    if name not in [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]:
        raise ValueError(
            f"report_to {name} needs a package that is not installed: run pip install {name}, or "
            'pip install "sdt_diffusion[trackers]" for wandb, swanlab and trackio.'
        )


@dataclass(frozen=True)
class TrainingSet:
    """The training data of a run.

    Args:
        images: The data set; see `ShuffledStream`.
        augment: See `ShuffledStream`.
        num_repeats: See `ShuffledStream`.
        class_balanced: See `ShuffledStream`; the data set then has `labels`.
        num_workers: Processes that load images.
        identity: What steps depend on besides the arguments, such as fingerprints of data.
        relocatable: Names of arguments that are paths to data in `identity`; a resumed run may change them.
    """

    images: Any
    augment: Callable[[Any, int], torch.Tensor] | None = None
    num_repeats: int = 1
    class_balanced: bool = False
    num_workers: int = 0
    identity: Mapping[str, Any] = field(default_factory=dict)
    relocatable: tuple[str, ...] = ()

    def __post_init__(self):
        check_value("num_repeats", self.num_repeats, (int,), Range(1, 1000))
        check_value("num_workers", self.num_workers, (int,), Range(0, 1024))


@dataclass(frozen=True)
class TrainingConfig(CheckedArguments):
    """Everything a run depends on besides model, loss and data, resolved before it starts.

    Args:
        run: Length, folder, batches and intervals.
        optimization: Optimizer and learning rate.
        ema: Averages of the weights.
        validation_steps: Steps between validations; 0 for none but the last.
        validate_first: Whether to validate before the first step too.
        arguments: All argument dataclasses of the script, which are recorded beside the run.
        flops_per_image: Floating-point operations of one image's forward pass, to log TFLOP/s and MFU; `None` to log
            images per second only.
    """

    run: RunArguments
    optimization: OptimizationArguments = field(default_factory=OptimizationArguments)
    ema: EMAArguments = field(default_factory=EMAArguments)
    validation_steps: int = field(default=0, metadata=at_least(0))
    validate_first: bool = False
    arguments: tuple[Any, ...] = ()
    flops_per_image: float | None = None

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run.output_dir)

    def as_dict(self) -> dict[str, Any]:
        """Return all arguments of the script in one flat dictionary."""
        return merged(*(self.arguments or (self.run, self.optimization, self.ema)))

    def resumable(self) -> frozenset[str]:
        """Return the names of the arguments that a resumed run may change."""
        return frozenset(fields_with("resumable", *(self.arguments or (self.run, self.optimization, self.ema))))
