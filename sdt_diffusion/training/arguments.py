"""Command lines and YAML files to dataclasses, and the arguments that all training scripts share."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser


@dataclass
class OptimizationArguments:
    """How to optimise. Defaults are DiT's."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler: str = field(default="constant", metadata={"help": "A schedule of diffusers.optimization."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta1."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta2."})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip gradients to this norm."})
    use_ema: bool = field(default=True, metadata={"help": "Average the weights; the average is what is saved."})
    ema_decay: float = field(default=0.9999, metadata={"help": "Decay of the average, reached by a ramp."})
    ema_min_decay: float = field(default=0.0, metadata={"help": "Decay from the start; DiT's constant is 0.9999."})


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
    checkpointing_steps: int = field(default=5000, metadata={"help": "Steps between checkpoints."})
    checkpoints_total_limit: int | None = field(default=None, metadata={"help": "Checkpoints to keep."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'latest', or the path of a checkpoint-N folder."}
    )
    logging_steps: int = field(default=10, metadata={"help": "Steps between logged losses."})
    report_to: str = field(default="tensorboard", metadata={"help": "Tracker of accelerate, or 'none'."})
    logging_dir: str = field(default="logs", metadata={"help": "The tracker's folder in output_dir."})


#: Keys a resumed run may change: none of them alters what an already made step did.
RESUMABLE_CHANGES = frozenset(
    {
        "output_dir",
        "max_train_steps",
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
    default_config: Path | None = None,
    default_config_unless: str | None = None,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Parses a command line into dataclasses, over values from a YAML file.

    `--config FILE` names the YAML file, a flat mapping of the same keys; the command line wins. Unknown keys and flags
    are errors that name them.

    Args:
        dataclass_types: The dataclasses.
        argv: Command line without the program's name.
        default_config: YAML file to use when `--config` is not given,
        default_config_unless: ... nor this flag.
        description: Shown by `--help`.

    Returns:
        An instance of each dataclass.
    """
    parser = HfArgumentParser(dataclass_types, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=None, help="YAML file of these arguments.")
    given = parser.parse_known_args(argv)[0].config
    names_flag = any(arg.split("=")[0] == default_config_unless for arg in argv)
    config_file = given or (None if names_flag else default_config)
    values = _read_yaml(parser, config_file) if config_file else {}
    known = {f.name for dataclass_type in dataclass_types for f in dataclasses.fields(dataclass_type)}
    unknown = sorted(set(values) - known)
    if unknown:
        parser.error(f"{config_file}: unknown key(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    # As flags, values from the file are checked and converted like those of the command line.
    flags = []
    for key, value in values.items():
        if value is not None:
            flags += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    *parsed, _, rest = parser.parse_args_into_dataclasses([*flags, *argv], return_remaining_strings=True)
    if rest:
        parser.error(f"unknown argument(s) {' '.join(rest)}")
    return tuple(parsed)


def merged(*arguments: Any) -> dict[str, Any]:
    """The values of several argument dataclasses in one flat dictionary."""
    return {key: value for instance in arguments for key, value in dataclasses.asdict(instance).items()}


def _read_yaml(parser, path):
    if not path.is_file():
        parser.error(f"--config: there is no file {path}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        parser.error(f"{path} is not valid YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"{path} must hold a mapping of argument names to values")
    return values
