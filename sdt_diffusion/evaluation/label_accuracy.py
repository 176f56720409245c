"""Measure how many samples show their class, by an RBF SVM that is trained on the real images.

    python eval/label_accuracy.py --model outputs/digits --dataset digits

For small images and data sets only; train/train_dit.py reports the same measure at the end of a run on the digits.
Guidance and steps are those saved in the pipeline.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ..data import DataArguments, LabeledImages, load_images
from ..data.decoding import IMAGE_MODES
from ..sampling.generate import class_labels_for, describe_sampling, generate, stack_samples
from ..sampling.settings import SamplingArguments, default_device, load_pipeline
from ..sdt import SDTPipeline
from ..sdt.vae import VAELayout
from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.ranges import LARGEST, CheckedArguments, Range, between, check_number

#: Pixel values of all real images, or of all samples, that an SVM can take: 1 GB.
MAX_SVM_VALUES = 1 << 28


def label_accuracy(
    pipe: SDTPipeline, real: LabeledImages, num_images: int, sampling: dict[str, Any], batch_size: int = 64
) -> dict[str, Any]:
    """Return the fraction of samples that an RBF SVM, trained on the real images, gives their label.

    Args:
        pipe: The pipeline.
        real: The real images.
        num_images: Samples, the classes in turn.
        sampling: `seed`, `guidance_scale` and `num_inference_steps`.
        batch_size: Samples at a time.

    Returns:
        `kind`, `label_accuracy`, `num_images`, `num_real_images`, and the `sampler` in words.

    Raises:
        ValueError: If the samples are not of the real images' size, or the pipeline has fewer classes.
    """
    check_number("num_images", num_images, Range(1, LARGEST))
    check_number("batch_size", batch_size, Range(1, LARGEST))
    labels = class_labels_for(num_images, range(real.num_classes))
    pipe.prepare_class_labels(sorted(set(labels)))
    channels, height, width = np.asarray(real[0][0]).shape
    made = shape_of_samples(pipe, sampling.get("height"), sampling.get("width"))
    if made != (height, width, channels):
        raise ValueError(f"Samples of shape {made} do not fit real images {(height, width, channels)}.")
    if len(real) * prod(made) > MAX_SVM_VALUES:
        raise ValueError(f"{len(real)} real images of {height}x{width} pixels are too many for an RBF SVM.")
    samples = stack_samples(generate(pipe, labels, batch_size=batch_size, output_type="np", **sampling))
    return {
        "kind": "label_accuracy",
        "label_accuracy": svm_label_accuracy(real, samples, labels),
        "num_images": num_images,
        "num_real_images": len(real),
        "sampler": describe_sampling(pipe, sampling),
    }


def svm_label_accuracy(real: LabeledImages, samples: np.ndarray, labels: Sequence[int]) -> float:
    """Return the fraction of samples to which an RBF support vector machine gives the label they were made for.

    The machine is trained on the pixels of the real images: a measure for small images and data sets, such as digits.

    Args:
        real: The real images, all of which are read into memory.
        samples: Samples of the same size, shape (n, height, width, channels), 0 to 1.
        labels: The labels they were made for.

    Raises:
        ValueError: If the samples are not of the real images' size, or not as many as the labels.
    """
    from sklearn.svm import SVC  # training imports this module and may not need the SVM

    images = [np.asarray(image) for image, _ in real.__getitems__(range(len(real)))]  # (C, H, W), -1 to 1
    pixels = np.stack(images).transpose(0, 2, 3, 1) / 2 + 0.5  # (n, H, W, C), 0 to 1
    if samples.shape[1:] != pixels.shape[1:] or len(samples) != len(labels):
        raise ValueError(
            f"{len(labels)} labels and samples of shape {samples.shape} do not fit real images {pixels.shape}."
        )
    classifier = SVC(kernel="rbf", C=10.0, gamma="scale")
    classifier.fit(pixels.reshape(len(pixels), -1), real.labels)
    return float((classifier.predict(samples.reshape(len(samples), -1)) == np.asarray(labels)).mean())


def shape_of_samples(pipe: SDTPipeline, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """Return height, width and channels of the images that a pipeline makes, by default on its trained grid.

    Raises:
        ValueError: If they are neither gray nor RGB.
    """
    size = pipe.transformer.config.sample_size
    trained_height, trained_width = (size, size) if isinstance(size, int) else size
    channels = pipe.transformer.config.in_channels if pipe.vae is None else VAELayout.of(pipe.vae).image_channels
    if channels not in IMAGE_MODES:
        raise ValueError(f"The pipeline makes images of {channels} channels; only 1 and 3 can be evaluated.")
    factor = pipe.vae_scale_factor
    return height or trained_height * factor, width or trained_width * factor, channels


@dataclass
class LabelAccuracyArguments(CheckedArguments):
    """How many samples to judge."""

    num_images: int = field(
        default=1000,
        metadata={"help": "Samples, the classes in turn.", "aliases": ["--num_samples"]} | between(1, 1_000_000),
    )


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    types = (LabelAccuracyArguments, SamplingArguments, DataArguments)
    args, sampling_args, data_args = parse_arguments(types, argv, description=__doc__)
    pipe = load_pipeline(sampling_args, default_device())
    sample_size = pipe.transformer.config.sample_size
    if not isinstance(sample_size, int):
        raise ValueError(f"model: {sampling_args.model} does not make square images, but {sample_size}.")
    images = load_images(data_args, sample_size * pipe.vae_scale_factor)
    settings = sampling_args.settings(pipe)
    results = label_accuracy(pipe, images, args.num_images, settings, sampling_args.batch_size)
    print(json.dumps(results, allow_nan=False))


if __name__ == "__main__":
    main()
