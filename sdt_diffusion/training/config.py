"""The arguments that all training scripts share."""

from dataclasses import dataclass, field
from typing import Literal

from diffusers.optimization import SchedulerType

from ..utils.arguments import require_at_least
from .ema import gamma_of


@dataclass
class OptimizationArguments:
    """How to optimise. AdamW as in DiT, which has no clipping and `ema_profile="constant"`."""

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
    ema_profile: Literal["ramped", "constant", "power"] = field(
        default="ramped",
        metadata={"help": "The average's decay: rising to ema_decay, always that (DiT), or EDM2's of ema_sigma_rel."},
    )
    ema_decay: float = field(default=0.9999, metadata={"help": "Decay of a ramped or constant average."})
    ema_sigma_rel: list[float] = field(
        default_factory=lambda: [0.05, 0.1],
        metadata={"help": "Widths of power averages, as parts of the training; the first is what is saved."},
    )
    ema_snapshot_steps: int = field(
        default=0,
        metadata={"help": "Steps between snapshots of power averages, for train/reconstruct_ema.py; 0 for none."},
    )

    def __post_init__(self):
        require_at_least(self, 0, "learning_rate", "lr_warmup_steps", "min_lr", "adam_weight_decay", "max_grad_norm")
        require_at_least(self, 0, "ema_decay", "ema_snapshot_steps")
        SchedulerType(self.lr_scheduler)  # names those that there are
        if self.min_lr and not self.min_lr <= self.learning_rate:
            raise ValueError(f"--min_lr {self.min_lr} is above --learning_rate {self.learning_rate}.")
        if self.ema_decay > 1:
            raise ValueError(f"--ema_decay must be at most 1, not {self.ema_decay}.")
        for sigma_rel in self.ema_sigma_rel:
            gamma_of(sigma_rel)
        names = {f"{sigma_rel:g}" for sigma_rel in self.ema_sigma_rel}
        if len(names) != len(self.ema_sigma_rel) or not names:
            raise ValueError(f"--ema_sigma_rel must be different numbers, not {self.ema_sigma_rel}.")
        if self.ema_snapshot_steps and not (self.use_ema and self.ema_profile == "power"):
            raise ValueError("--ema_snapshot_steps needs --ema_profile power: only its averages can be combined.")


@dataclass
class RunArguments:
    """Length, place and pace of a run."""

    output_dir: str = field(default="outputs/sdt", metadata={"help": "Where everything goes."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    train_batch_size: int = field(default=256, metadata={"help": "Batch size of a process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches for one step."})
    max_train_steps: int = field(
        default=400_000, metadata={"help": "Optimizer steps in all; a schedule such as cosine ends there."}
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "By default what accelerate is told, else bf16 on accelerators that have it."}
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
    max_skipped_steps: int = field(
        default=50,
        metadata={"help": "Steps in a row that may be left out because the loss or the gradient is not finite."},
    )
    logging_steps: int = field(default=10, metadata={"help": "Steps between logged losses."})
    report_to: str = field(default="tensorboard", metadata={"help": "Tracker of accelerate, or 'none'."})
    logging_dir: str = field(default="logs", metadata={"help": "The tracker's folder in output_dir."})

    def __post_init__(self):
        require_at_least(self, 0, "seed", "checkpointing_steps", "max_skipped_steps")
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
        "train_batch_size",  # these two as long as their product with the number of processes stays what it is
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "max_skipped_steps",
        "ema_snapshot_steps",
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
