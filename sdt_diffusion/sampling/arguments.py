"""How to sample."""

from dataclasses import dataclass, field
from typing import Literal

from ..utils.arguments import require_at_least


@dataclass
class SamplingArguments:
    """How to sample, with --model."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub name of a saved pipeline."})
    num_samples: int | None = field(
        default=None, metadata={"help": "Samples; 50000 with --model, all there are with --samples by default."}
    )
    class_labels: Literal["balanced", "random"] = field(
        default="balanced", metadata={"help": "The classes in turn, or each sample's drawn by its seed."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    guidance_scale: float = field(default=1.5, metadata={"help": "Classifier-free guidance; 1 for none."})
    num_inference_steps: int = field(default=250, metadata={"help": "Sampling steps."})
    scheduler: str | None = field(
        default=None, metadata={"help": "Class name of another diffusers scheduler than the saved one."}
    )
    batch_size: int = field(default=64, metadata={"help": "Samples at a time on each process."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "The pipeline's arithmetic."}
    )
    samples_dir: str | None = field(
        default=None, metadata={"help": "Where samples are kept; a folder beside --output by default."}
    )

    def __post_init__(self):
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "num_samples", "num_inference_steps", "batch_size")
