"""Command lines and YAML files to dataclasses, and the arguments that all training scripts share."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from transformers import HfArgumentParser


@dataclass
class OptimizationArguments:
    """How to optimise. AdamW as in DiT, which has no clipping and a constant EMA (`ema_min_decay=0.9999`)."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler: str = field(default="constant", metadata={"help": "A schedule of diffusers.optimization."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up."})
    min_lr: float = field(default=0.0, metadata={"help": "Where the schedule ends instead of 0."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta1."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta2."})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip gradients to this norm; 0 for not."})
    use_ema: bool = field(default=True, metadata={"help": "Average the weights; the average is what is saved."})
    ema_decay: float = field(default=0.9999, metadata={"help": "Decay of the average, reached by a ramp."})
    ema_min_decay: float = field(default=0.0, metadata={"help": "Decay from the start; DiT's constant is 0.9999."})

    def __post_init__(self):
        require_at_least(self, 0, "learning_rate", "lr_warmup_steps", "min_lr", "adam_weight_decay", "max_grad_norm")
        if self.min_lr and not self.min_lr <= self.learning_rate:
            raise ValueError(f"--min_lr {self.min_lr} is above --learning_rate {self.learning_rate}.")


@dataclass
class RunArguments:
    """Length, place and pace of a run."""

    output_dir: str = field(default="outputs/sdt", metadata={"help": "Where everything goes."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    train_batch_size: int = field(default=256, metadata={"help": "Batch size of a process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches for one step."})
    max_train_steps: int = field(default=400_000, metadata={"help": "Optimizer steps in all."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Accelerate's config by default."}
    )
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of a process on CPU; all cores, shared by its processes, by default."}
    )
    allow_tf32: bool = field(default=False, metadata={"help": "TF32 matrix products on CUDA."})
    checkpointing_steps: int = field(
        default=5000, metadata={"help": "Steps between checkpoints; 0 for one at the end."}
    )
    checkpoints_total_limit: int | None = field(default=None, metadata={"help": "Checkpoints to keep."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'latest', or the path of a checkpoint-N folder."}
    )
    logging_steps: int = field(default=10, metadata={"help": "Steps between logged losses."})
    report_to: str = field(default="tensorboard", metadata={"help": "Tracker of accelerate, or 'none'."})
    logging_dir: str = field(default="logs", metadata={"help": "The tracker's folder in output_dir."})

    def __post_init__(self):
        require_at_least(self, 0, "seed", "checkpointing_steps")
        require_at_least(
            self,
            1,
            "train_batch_size",
            "gradient_accumulation_steps",
            "max_train_steps",
            "logging_steps",
            "cpu_threads",
        )


def require_at_least(arguments: Any, least: float, *names: str) -> None:
    """Refuses values that are too small.

    Raises:
        ValueError: Names the first such argument.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name} must be at least {least}, not {value}.")


#: Keys a resumed run may change: none of them alters what an already made step did.
RESUMABLE_CHANGES = frozenset(
    {
        "output_dir",
        "max_train_steps",
        "num_train_epochs",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "logging_steps",
        "report_to",
        "logging_dir",
        "dataloader_num_workers",
        "validation_steps",
        "num_validation_images",
        "guidance_scale",
        "num_inference_steps",
        "label_accuracy_samples",
    }
)


def parse_arguments(
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    recipes: dict[str, Path] | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Parses a command line into dataclasses, over values from a YAML file.

    `--config FILE` names the YAML file, a flat mapping of the same keys; the command line wins. Unknown keys and
    flags, and values that do not fit, are errors that name them.

    Args:
        dataclass_types: The dataclasses.
        argv: Command line without the program's name.
        recipes: `--dataset` value -> YAML file that is used when `--config` is not given.
        description: Shown by `--help`.

    Returns:
        An instance of each dataclass.
    """
    parser = HfArgumentParser(
        dataclass_types,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file of these arguments.")
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config", type=Path)
    first_look.add_argument("--dataset", default="digits")
    given = first_look.parse_known_args(argv)[0]
    config_file = given.config or (recipes or {}).get(given.dataset)
    known = {f.name: f.type for dataclass_type in dataclass_types for f in dataclasses.fields(dataclass_type)}
    lists = {name for name, kind in known.items() if get_origin(kind) is list}
    values = _read_yaml(parser, config_file, lists) if config_file else {}
    unknown = sorted(set(values) - set(known))
    if unknown:
        parser.error(f"{config_file}: unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    # As flags, values from the file are checked and converted like those of the command line.
    flags = [
        word
        for key, value in values.items()
        for word in ([f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"])
    ]
    try:
        *parsed, _, rest = parser.parse_args_into_dataclasses([*flags, *argv], return_remaining_strings=True)
    except ValueError as error:
        parser.error(str(error))
    if rest:
        parser.error(f"unknown argument(s) {' '.join(rest)}")
    return tuple(parsed)


def merged(*arguments: Any) -> dict[str, Any]:
    """The values of several argument dataclasses in one flat dictionary."""
    return {key: value for instance in arguments for key, value in dataclasses.asdict(instance).items()}


def _read_yaml(parser, path, lists):
    if not path.is_file():
        parser.error(f"--config: there is no file {path}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
        as_written = yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # "no" and 1e-4 as they stand, for argparse
    except yaml.YAMLError as error:
        parser.error(f"{path} is not valid YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"{path} must hold a mapping of argument names to values")
    text = {}
    for key, value in values.items():
        if key in lists and isinstance(value, list):
            text[key] = as_written[key]
        elif value is not None:
            text[str(key)] = json.dumps(value) if isinstance(value, (dict, list)) else as_written[str(key)]
    return text
