"""The numbers that a model's folder holds, each with how it came about."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..metrics.confusion import from_log
from .run_record import shorten


@dataclass(frozen=True)
class Result:
    """A number of the model card.

    Args:
        metric: Its name, with the number of samples where that matters.
        value: The number.
        shown: The number as it is printed.
        data: What it was measured on or against.
        images: Number of samples, or of test images.
        how: Sampler, steps, network evaluations and guidance; or nothing.
        file: Where it stands in full.
    """

    metric: str
    value: float
    shown: str
    data: str
    images: int
    how: str
    file: str


def read_results(folder: Path, weights: str) -> list[Result]:
    """Finds what eval/fid.py, eval/accuracy.py and the training scripts wrote into a model's folder.

    Args:
        folder: The folder; JSON files of others in it are passed over.
        weights: Fingerprint of the model's weights. Numbers of others, which a run that went on may have left there,
            are passed over with a warning.

    Raises:
        ValueError: If a file is damaged.
    """
    results = []
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, or make it again.") from error
        found = []
        if isinstance(content, dict):
            found = [
                *_of_fid(content, path.name),
                *_of_accuracy(content, path.name),
                *_of_training(content, path.name),
            ]
        if found and _weights_of(content) not in (None, weights):
            warnings.warn(f"{path} is of other weights than the model's: left out of its card.", stacklevel=2)
        else:
            results += found
    return results


def _of_fid(content: dict[str, Any], file: str) -> Iterator[Result]:
    if not {"samples", "reference", "settings"} <= content.keys():
        return
    samples, reference = content["samples"], content["reference"]
    against = shorten(reference.get("images", reference["path"]))
    for name, label in content.get("labels", {}).items():
        spread = f" ± {content[f'{name}_std']:.4g}" if f"{name}_std" in content else ""
        yield Result(
            label,
            content[name],
            f"{content[name]:.6g}{spread}",
            f"{against}, {reference.get('count', 'unknown number of')} images",
            samples["count"],
            samples.get("sampler", "sampler unknown"),
            file,
        )


def _of_accuracy(content: dict[str, Any], file: str) -> Iterator[Result]:
    if not {"top1", "top5", "data", "classes"} <= content.keys():
        return
    data = content["data"]
    split = f" ({data['split']})" if data["split"] else ""
    for key, metric in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy")):
        if content[key] is not None:
            value = content[key]
            yield Result(metric, value, f"{value:.2%}", f"{shorten(data['dataset'])}{split}", data["count"], "", file)


def _of_training(content: dict[str, Any], file: str) -> Iterator[Result]:
    if "label_accuracy" in content:
        judge = f"an RBF SVM trained on the {content['num_real_images']} real images"
        value = content["label_accuracy"]
        yield Result("label accuracy", value, f"{value:.1%}", judge, content["num_images"], content["sampler"], file)
    of_classifier = content.get("kind") == "classifier_training" or "test_accuracy" in content  # now, and before
    tested = from_log(content) if of_classifier else {}
    for key, metric in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy")):
        value = tested.get(key)
        if value is not None:
            yield Result(metric, value, f"{value:.2%}", "held-out images", tested["count"], "", file)


def _weights_of(content):
    """The fingerprint of what was measured, where it can be compared: rounded weights have another."""
    measured = {**content.get("samples", {}), **content.get("throughput", {})}
    if measured.get("dtype") != "float32":
        return None
    return measured.get("model_weights") or content["model"]["weights"]
