"""Read the numbers that a model's folder holds, and how each was measured."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.files import shorten_path
from ..utils.reading import read_json


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
        file: Name of the file that it comes from.
    """

    metric: str
    value: float
    shown: str
    data: str
    images: int
    how: str
    file: str


def read_results(folder: Path, weights: str) -> list[Result]:
    """Read what the evaluation and training scripts wrote into a model's folder.

    Args:
        folder: The folder; JSON files of other kinds are skipped.
        weights: Fingerprint of the model's weights. Numbers of other weights, which an earlier part of the run may
            have left there, are skipped with a warning.

    Raises:
        ValueError: If a file is damaged.
    """
    results: list[Result] = []
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            content = read_json(path, object)
            read = READERS.get(kind_of(content))
            found = [] if read is None else list(read(content, path.name))
            measured = _weights_of(content) if found else None
        except KeyError as error:
            raise ValueError(f"{path} is damaged (it has no {error}): delete it, or make it again.") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, or make it again.") from error
        if measured not in (None, weights):
            warnings.warn(
                f"{path} was measured with other weights than the model's: left out of its card.", stacklevel=2
            )
        else:
            results += found
    return results


def kind_of(content: Any) -> str | None:
    """Return the kind of a results file, inferred from its keys if it has no `kind`."""
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("kind"), str):
        return content["kind"]
    for kind, keys in (
        ("fid", {"samples", "reference", "settings"}),
        ("accuracy", {"top1", "top5", "data", "classes"}),
        ("label_accuracy", {"label_accuracy", "num_real_images"}),
        ("classifier_training", {"test_accuracy", "test_images"}),
    ):
        if keys <= content.keys():
            return kind
    return None


def _read_fid(content: Mapping[str, Any], file: str) -> Iterator[Result]:
    samples, reference = content["samples"], content["reference"]
    against = shorten_path(reference.get("images", reference["path"]))
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


def _read_accuracy(content: Mapping[str, Any], file: str) -> Iterator[Result]:
    data = content["data"]
    split = f" ({data['split']})" if data["split"] else ""
    for key, metric in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy")):
        if content[key] is not None:
            value, where = content[key], f"{shorten_path(data['dataset'])}{split}"
            yield Result(metric, value, f"{value:.2%}", where, data["count"], "", file)


def _read_label_accuracy(content: Mapping[str, Any], file: str) -> Iterator[Result]:
    judge = f"an RBF SVM trained on the {content['num_real_images']} real images"
    value = content["label_accuracy"]
    yield Result("label accuracy", value, f"{value:.1%}", judge, content["num_images"], content["sampler"], file)


def _read_classifier_training(content: Mapping[str, Any], file: str) -> Iterator[Result]:
    for keys, metric in (
        (("top1", "test_accuracy"), "top-1 accuracy"),  # the latter are the names in older files
        (("top5", "test_accuracy_top5"), "top-5 accuracy"),
    ):
        value = next((content[key] for key in keys if content.get(key) is not None), None)
        if value is not None:
            count = content["count"] if "count" in content else content["test_images"]
            yield Result(metric, value, f"{value:.2%}", "held-out images", count, "", file)


#: Kind of a results file -> function that reads its numbers, given its content and name.
READERS: Mapping[str | None, Callable[[Mapping[str, Any], str], Iterator[Result]]] = {
    "fid": _read_fid,
    "accuracy": _read_accuracy,
    "label_accuracy": _read_label_accuracy,
    "classifier_training": _read_classifier_training,
}


def _weights_of(content: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the measured weights; `None` for half precision, which changes the fingerprint."""
    measured = {**content.get("samples", {}), **content.get("throughput", {})}
    if measured.get("dtype") != "float32":
        return None
    return measured.get("model_weights") or content["model"]["weights"]
