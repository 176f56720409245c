"""Measure a finished cell: the curves of its log, its speed, and its samples by a fixed extractor."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32

from ..data.raw_images import RawImageArguments, open_images
from ..evaluation.fid import FidSamplingArguments
from ..evaluation.labels import match_labels
from ..evaluation.make_reference import save_reference
from ..metrics.comparison import frechet_distance
from ..metrics.extractors import FeatureExtractor
from ..metrics.features import FeatureSummary, RunningGaussian
from ..sampling.generate import class_labels_for, describe_sampling, generate
from ..sampling.settings import load_pipeline
from ..utils.reading import read_json
from .study import Evaluation

#: Trainer -> the held-out loss of its log that studies compare.
HELD_OUT = {"train_dit": "velocity_error", "train_classifier": "test_loss"}
#: Points of a training loss that results files keep.
MAX_POINTS = 100
#: Stands for the side of the images that a model was trained on.
TRAINED = "trained"
#: Seed of all samples: those of two variants start from the same noise.
SAMPLING_SEED = 0


def curve(records: Sequence[dict[str, Any]], key: str, digits: int = 7) -> dict[str, list[float]]:
    """Return steps and values of what a log holds under a key, without those that are not finite."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return {"steps": [step for step, _ in points], "values": [rounded(value, digits) for _, value in points]}


def curves(trainer: str, records: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the curves of a log: training and held-out loss, a classifier's accuracy, what is known of gates."""
    found = {"loss": thinned(curve(records, "loss")), "held_out_loss": curve(records, HELD_OUT[trainer])}
    if trainer == "train_classifier":
        found["accuracy"] = curve(records, "test_accuracy")
    gates = sorted({key for record in records for key in record if key.startswith("gate_")})
    return {**found, **{key: curve(records, key, digits=4) for key in gates}}


def thinned(points: dict[str, list[float]], most: int = MAX_POINTS) -> dict[str, list[float]]:
    """Return a curve of at most `most` points, each the mean of as many neighbors."""
    size = -(-len(points["steps"]) // most) or 1
    groups = [slice(start, start + size) for start in range(0, len(points["steps"]), size)]
    return {key: [rounded(float(np.mean(values[group]))) for group in groups] for key, values in points.items()}


def seconds_per_step(records: Sequence[dict[str, Any]], images_per_step: int) -> dict[str, float]:
    """Return the median duration of the log's intervals, and the first decile, which other processes slow least."""
    speeds = [record["images_per_second"] for record in records if "images_per_second" in record]
    seconds = [images_per_step / speed for speed in speeds[1:] or speeds]  # the first interval warms up
    return {
        "seconds_per_step": rounded(float(np.median(seconds))),
        "seconds_per_step_first_decile": rounded(float(np.quantile(seconds, 0.1))),
    }


def final_values(trainer: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the last validation of a log measured: a held-out loss, and what there is besides.

    Raises:
        ValueError: If the log has no validation, or its loss is not finite.
    """
    validations = [record for record in records if HELD_OUT[trainer] in record]
    last = validations[-1] if validations else {}
    key = "test_loss" if trainer == "train_classifier" else "final_velocity_error"
    if last.get(key) is None:
        raise ValueError(f"The log holds no finite {key}.")
    values: dict[str, Any] = {"held_out_loss": rounded(last[key])}
    if trainer == "train_classifier":
        return {**values, "accuracy": rounded(last["test_accuracy"])}
    parts = {name.partition("/")[2]: value for name, value in last.items() if name.startswith(f"{key}/")}
    return {**values, "velocity_error_by_noise_level": {name: rounded(value) for name, value in parts.items()}}


def reference_path(folder: Path, evaluation: Evaluation, resolution: int | None, extractor: FeatureExtractor) -> Path:
    """Return the file that keeps the statistics of a study's reference."""
    identity = [evaluation.reference, resolution, extractor.identity]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder / f"reference-{digest[:8]}.safetensors"


def make_reference(path: Path, evaluation: Evaluation, resolution: int | None, extractor: FeatureExtractor) -> None:
    """Write the statistics of the reference's images, unless an earlier cell has.

    Args:
        path: See `reference_path`.
        evaluation: Names the images.
        resolution: Side that the study's images are cropped to; `None` to leave them as they are.
        extractor: Computes the features.

    Raises:
        OSError: If the images do not exist, or the file cannot be written.
        ValueError: If an image cannot be used.
    """
    if not path.is_file():
        images = open_images(str(evaluation.reference), RawImageArguments(resolution=resolution))
        save_reference(path, images, extractor, num_features=0)


@torch.no_grad()
def judge_samples(
    folder: Path,
    evaluation: Evaluation,
    reference: FeatureSummary,
    extractor: FeatureExtractor,
    precision: str,
    side: int | None = None,
    scaling: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Sample from a pipeline, without keeping the samples, and compare them with the reference.

    Args:
        folder: The pipeline.
        evaluation: Number of samples, steps, batch size.
        reference: Statistics of the reference, by the same extractor.
        extractor: Computes the features, and logits if it is a classifier.
        precision: "no" or "bf16", that of training: network evaluations are made in it.
        side: Side of the samples in pixels; the trained one by default.
        scaling: Arguments of `set_grid_scaling`, for another side.

    Returns:
        `fd`, the `sampler` in words, and of a classifier `sample_accuracy`, the share of samples that it takes for
        their class.

    Raises:
        ValueError: If the extractor does not know the classes, a sample is not finite, or samples are of another
            shape than the reference's images.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(FidSamplingArguments(model=str(folder)), device)
    pipe.transformer.set_grid_scaling(**scaling)
    if precision == "bf16":
        network = pipe.transformer
        network.forward = convert_outputs_to_fp32(torch.autocast(device, torch.bfloat16)(network.forward))
    sampling: dict[str, Any] = {
        "seed": SAMPLING_SEED,
        "guidance_scale": 1.0,
        "num_inference_steps": evaluation.num_inference_steps,
        **({} if side is None else {"height": side, "width": side}),
    }
    num_classes = pipe.transformer.config.num_classes
    labels = class_labels_for(evaluation.samples, range(num_classes))
    names = [pipe.id2label[label] for label in range(num_classes)]
    expected = None
    if "logits" in extractor.provides and hasattr(extractor, "network"):
        known, _ = match_labels(names, extractor.network.config.id2label)
        expected = torch.tensor([known[label] for label in labels])
    gaussian, correct, prepared = RunningGaussian(), 0, []
    samples = generate(pipe, labels, batch_size=evaluation.batch_size, output_type="np", progress=False, **sampling)
    for index, image in samples:
        if not np.isfinite(image).all():
            raise ValueError(f"Sample {index} is not finite.")
        if index == 0 and list(image.shape) != reference.provenance.get("shape"):
            raise ValueError(f"Samples are of shape {image.shape}, the reference's {reference.provenance['shape']}.")
        prepared.append(extractor.prepare((image * 255).round().astype(np.uint8)))
        if len(prepared) == extractor.batch_size or index == len(labels) - 1:
            features = extractor(torch.stack(prepared).to(device))
            gaussian.update(features["pool"])
            if expected is not None:
                classes = expected[index + 1 - len(prepared) : index + 1]
                correct += int((features["logits"].argmax(1).cpu() == classes).sum())
            prepared = []
    values = {
        "fd": rounded(frechet_distance(gaussian.result(), reference.statistics["pool"])),
        "sampler": describe_sampling(pipe, sampling),
        "samples": len(labels),
    }
    if expected is not None:
        values["sample_accuracy"] = rounded(correct / len(labels))
    return values


def describe_extractor(evaluation: Evaluation, extractor: FeatureExtractor) -> dict[str, Any]:
    """Return what identifies an extractor, and the accuracy that its training has measured, if it is a classifier."""
    record: dict[str, Any] = {"weights": extractor.fingerprint}
    results = Path(evaluation.extractor) / "results.json"
    if results.is_file():
        record["top1"] = read_json(results).get("top1")
    return record


def rounded(value: float, digits: int = 7) -> float:
    """Return a number with the digits that can matter, to keep results files small."""
    return float(f"{value:.{digits}g}")
