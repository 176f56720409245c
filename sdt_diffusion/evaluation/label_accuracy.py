"""Judging a pipeline for small images by a classifier of pixels."""

from typing import Any

from ..data import LabelledImages
from ..generation import class_labels_for, describe_sampling, generate, stack_samples
from ..metrics.label_accuracy import svm_label_accuracy
from ..sdt import SDTPipeline


def label_accuracy(
    pipe: SDTPipeline, real: LabelledImages, num_images: int, sampling: dict[str, Any], batch_size: int = 250
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
        "label_accuracy": svm_label_accuracy(real, samples, labels),
        "num_images": num_images,
        "num_real_images": len(real),
        "sampler": describe_sampling(pipe, sampling),
    }
