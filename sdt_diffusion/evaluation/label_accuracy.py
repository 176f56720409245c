"""How many samples of a pipeline an RBF SVM, trained on the real images, takes for the class they were made for.

    python eval/label_accuracy.py --model outputs/digits --dataset digits

For small images and data sets only; the same measure train/train_dit.py reports at the end of the digits run.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

import sdt_diffusion  # noqa: F401  (lets diffusers find the pipeline's classes)

from ..data import DataArguments, LabeledImages, load_images
from ..sampling.generate import class_labels_for, describe_sampling, generate, stack_samples
from ..sdt import SDTPipeline
from ..utils.arguments import parse_arguments, require_at_least


def label_accuracy(
    pipe: SDTPipeline, real: LabeledImages, num_images: int, sampling: dict[str, Any], batch_size: int = 250
) -> dict[str, Any]:
    """How many samples an RBF SVM, trained on the real images, takes for the class they were made for.

    Args:
        pipe: The pipeline.
        real: The real images.
        num_images: Samples, the classes in turn.
        sampling: `seed`, `guidance_scale` and `num_inference_steps`.
        batch_size: Samples at a time.

    Returns:
        `label_accuracy`, `num_images`, `num_real_images`, and the `sampler` in words.
    """
    labels = class_labels_for(num_images, range(real.num_classes))
    samples = stack_samples(generate(pipe, labels, batch_size=batch_size, output_type="np", **sampling))
    return {
        "kind": "label_accuracy",
        "label_accuracy": svm_label_accuracy(real, samples, labels),
        "num_images": num_images,
        "num_real_images": len(real),
        "sampler": describe_sampling(pipe, sampling),
    }


def svm_label_accuracy(real: LabeledImages, samples: np.ndarray, labels: Sequence[int]) -> float:
    """Fraction of samples that an RBF support vector machine, trained on the pixels of real images, gives their label.

    A measure for small images and data sets, such as the digits.

    Args:
        real: The real images, all of which are read into memory.
        samples: Samples of the same size, shape (n, height, width, channels), 0 to 1.
        labels: The labels they were made for.

    Raises:
        ValueError: If the samples are not of the real images' size, or not as many as the labels.
    """
    from sklearn.svm import SVC

    pixels = np.stack([image.permute(1, 2, 0).numpy() for image, _ in real.__getitems__(range(len(real)))]) / 2 + 0.5
    if samples.shape[1:] != pixels.shape[1:] or len(samples) != len(labels):
        raise ValueError(
            f"{len(labels)} labels and samples of shape {samples.shape} do not fit real images {pixels.shape}."
        )
    classifier = SVC(kernel="rbf", C=10.0, gamma="scale")
    classifier.fit(pixels.reshape(len(pixels), -1), real.labels)
    return float((classifier.predict(samples.reshape(len(samples), -1)) == np.asarray(labels)).mean())


@dataclass
class EvaluationArguments:
    """What to sample."""

    model: str = field(metadata={"help": "Folder of a saved pipeline."})
    num_images: int = field(default=1000, metadata={"help": "Samples, the classes in turn."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    guidance_scale: float = field(default=1.5, metadata={"help": "Classifier-free guidance."})
    num_inference_steps: int = field(default=25, metadata={"help": "Sampling steps."})
    batch_size: int = field(default=250, metadata={"help": "Images at a time."})

    def __post_init__(self):
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "num_images", "num_inference_steps", "batch_size")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    args, data_args = parse_arguments((EvaluationArguments, DataArguments), argv, description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.model).to(device)
    images = load_images(data_args, pipe.transformer.config.sample_size * pipe.vae_scale_factor)
    sampling = {
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
    }
    print(json.dumps(label_accuracy(pipe, images, args.num_images, sampling, args.batch_size)))
