"""The arguments that all training scripts share."""

from dataclasses import dataclass, field
from typing import Literal

from ..command_line import require_at_least


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
