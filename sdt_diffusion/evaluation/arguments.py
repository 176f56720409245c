"""The arguments of the scripts in eval/."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..command_line import require_at_least
from ..metrics.evaluate import METRICS
from .labels import Matching


@dataclass
class ExtractorArguments:
    """What to compare images by."""

    extractor: str = field(
        default="inception",
        metadata={
            "help": "inception (torch-fidelity's), cleanfid_clean, cleanfid_legacy_pytorch, "
            "cleanfid_legacy_tensorflow, dinov2, pixels, or the folder of an image classifier."
        },
    )
    extractor_weights: str | None = field(
        default=None, metadata={"help": "File (dinov2: folder) of its weights, instead of the published ones."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read and resize images."})

    def __post_init__(self):
        require_at_least(self, 0, "dataloader_num_workers")


@dataclass
class AccuracyArguments:
    """What to classify with what."""

    model: str = field(metadata={"help": "Folder or Hub name of an image classifier with its image processor."})
    dataset: str = field(
        metadata={"help": "Image folder (a subfolder a class), .parquet, .arrow or .tar file, Hub name, or 'digits'."}
    )
    output: Path = field(metadata={"help": "JSON file for the numbers; a picture of the confusion goes beside it."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split to read of a data set; the only one there is by default."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found by its type."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels; found by its type."})
    match_labels: Matching = field(
        default="auto",
        metadata={"help": "How classes become the model's labels: by name where both have names, else by index."},
    )
    batch_size: int = field(default=64, metadata={"help": "Images at a time on each process."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read and prepare images."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "The model's arithmetic."}
    )

    def __post_init__(self):
        require_at_least(self, 0, "dataloader_num_workers")
        require_at_least(self, 1, "batch_size")


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


@dataclass
class FidArguments:
    """What to compare, and what to say of it."""

    reference: str = field(
        metadata={
            "help": "Folder of images, data set (file, Hub name or 'digits'), .npz of ADM's tools, or statistics of "
            "eval/make_reference.py."
        }
    )
    output: Path = field(metadata={"help": "JSON file for the numbers; a picture and samples go beside it."})
    samples: str | None = field(
        default=None, metadata={"help": "Folder of images, .npz of ADM's layout, or --samples_dir of another run."}
    )
    metrics: list[str] = field(
        default_factory=list, metadata={"help": f"Of {', '.join(METRICS)}; all the extractor can give by default."}
    )
    samples_npz: Path | None = field(
        default=None, metadata={"help": "Also write the samples to this .npz, for ADM's evaluation."}
    )
    num_features: int = field(
        default=10_000, metadata={"help": "Images of the reference, at random, for precision, recall and KID."}
    )
    inception_splits: int = field(default=10, metadata={"help": "Splits of the Inception Score."})
    kid_subsets: int = field(default=100, metadata={"help": "Subsets of KID."})
    kid_subset_size: int = field(default=1000, metadata={"help": "Images in one."})

    def __post_init__(self):
        require_at_least(self, 1, "num_features", "inception_splits", "kid_subsets")
        require_at_least(self, 2, "kid_subset_size")


@dataclass
class DecayArguments:
    """Whose decays to draw, for what."""

    model: str = field(metadata={"help": "Folder or Hub name of a classifier (with --image) or of a pipeline."})
    output: Path = field(metadata={"help": "PNG file for the picture."})
    image: Path | None = field(default=None, metadata={"help": "Image to show to a classifier."})
    timestep: list[float] = field(
        default_factory=list, metadata={"help": "Timesteps to which to noise a generator's sample."}
    )
    class_label: str | None = field(default=None, metadata={"help": "Id or name of the class to sample."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample and its noise."})
    guidance_scale: float = field(default=1.5, metadata={"help": "Classifier-free guidance of the sample."})
    num_inference_steps: int = field(default=50, metadata={"help": "Sampling steps of the sample."})
    blocks: list[int] = field(
        default_factory=list, metadata={"help": "Blocks, from 0; the first, middle and last by default."}
    )
    patches: list[str] = field(
        default_factory=list,
        metadata={"help": "Patches to look from, such as 3,4 for row 3, column 4 of the first block's grid."},
    )
    attention: bool = field(default=False, metadata={"help": "Also draw the attention that comes of it."})

    def __post_init__(self):
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "num_inference_steps")
