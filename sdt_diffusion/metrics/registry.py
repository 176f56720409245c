"""The table of metrics: what each needs, how it is computed, and how its number is presented."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..utils.fingerprint import differences
from ..utils.ranges import CheckedArguments, between
from .comparison import NEIGHBORHOOD, frechet_distance, kernel_distance, manifold_coverage
from .extractors import FeatureExtractor
from .features import FeatureSummary


@dataclass(frozen=True)
class MetricSettings(CheckedArguments):
    """Settings of metrics.

    Args:
        inception_splits: Splits of the Inception Score.
        kid_subsets: Subsets of KID.
        kid_subset_size: Images of each set in one.
        device: Where to compute with features.
    """

    inception_splits: int = field(default=10, metadata=between(1, 10_000))
    kid_subsets: int = field(default=100, metadata=between(1, 100_000))
    kid_subset_size: int = field(default=1000, metadata=between(2, 1_000_000))
    device: torch.device | str = "cpu"


#: Computes a metric from the summaries of samples and reference: its value, or an average and its standard deviation.
Compute = Callable[[FeatureSummary, FeatureSummary, MetricSettings], float | tuple[float, float]]


@dataclass(frozen=True)
class Metric:
    """A metric of samples against a reference.

    Args:
        compute: See `Compute`.
        statistics: Kind of features whose Gaussians it compares, if any: a summary then holds them.
        features: Whether it compares the pooled features themselves: a summary then holds them.
        logits: Whether it needs the samples' Inception Score, and no reference.
        least_images: Minimum number of images on each side, or the name of the setting that holds it.
        title: Name in tables, if other than the metric's.
        general_title: Name in tables for extractors other than Inception, if other than the metric's.
    """

    compute: Compute
    statistics: str | None = None
    features: bool = False
    logits: bool = False
    least_images: int | str = 2
    title: str | None = None
    general_title: str | None = None

    @property
    def kind(self) -> str:
        """The kind of features."""
        return self.statistics or ("logits" if self.logits else "pool")


def _frechet(kind: str) -> Compute:
    return lambda samples, reference, settings: frechet_distance(samples.statistics[kind], reference.statistics[kind])


def _inception_score(samples, reference, settings):
    return samples.inception_score


def _precision(samples, reference, settings):
    return manifold_coverage(samples.features, reference.features, device=settings.device)


def _recall(samples, reference, settings):
    return manifold_coverage(reference.features, samples.features, device=settings.device)


def _kid(samples, reference, settings):
    return kernel_distance(samples.features, reference.features, settings.kid_subsets, settings.kid_subset_size)


#: Name -> metric. A new metric is one entry here.
METRICS = {
    "fid": Metric(_frechet("pool"), statistics="pool", title="FID", general_title="FD"),
    "sfid": Metric(_frechet("spatial"), statistics="spatial", title="sFID"),
    "inception_score": Metric(
        _inception_score,
        logits=True,
        least_images="inception_splits",
        title="Inception Score",
        general_title="score",
    ),
    "precision": Metric(_precision, features=True, least_images=NEIGHBORHOOD + 1),
    "recall": Metric(_recall, features=True, least_images=NEIGHBORHOOD + 1),
    "kid": Metric(_kid, features=True, least_images="kid_subset_size", title="KID", general_title="KD"),
}

#: Images of a full evaluation.
FULL_COUNT = 50_000


def check_metrics(names: Sequence[str], extractor: FeatureExtractor) -> None:
    """Refuse metrics that do not exist or that the extractor has no features for.

    Raises:
        ValueError: If there are any; says which are possible.
    """
    possible = [name for name, metric in METRICS.items() if metric.kind in extractor.provides]
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics: there is no {name!r}; there are {', '.join(METRICS)}.")
        if name not in possible:
            raise ValueError(
                f"metrics: {name} needs {METRICS[name].kind} features; the extractor {extractor.name} "
                f"gives {', '.join(possible)}."
            )


def check_reference(
    path: str, reference: FeatureSummary, names: Sequence[str], extractor: FeatureExtractor, has_images: bool
) -> None:
    """Refuse saved statistics that another extractor made, or that lack what the metrics need.

    Args:
        path: Path of the file, for messages.
        reference: What the file holds.
        names: Keys of `METRICS`.
        extractor: The extractor.
        has_images: Whether features can be extracted from images beside the statistics.

    Raises:
        ValueError: If so; says what differs or is missing.
    """
    now = {key: value for key, value in extractor.identity.items() if key in reference.provenance}
    found = differences({key: reference.provenance[key] for key in now}, now)
    if found:
        raise ValueError(f"{path} was made by another extractor ({'; '.join(found)}).")
    for kind, statistics in reference.statistics.items():
        dim = extractor.dims.get(kind, len(statistics.mean))
        if len(statistics.mean) != dim:
            raise ValueError(
                f"{path}: its {kind} statistics have {len(statistics.mean)} dimensions; {extractor.name} gives {dim}."
            )
    for name in names:
        metric = METRICS[name]
        if metric.statistics and metric.statistics not in reference.statistics:
            raise ValueError(f"metrics: {name} needs statistics of {metric.statistics} features; {path} has none.")
        if metric.features and reference.features is None and not has_images:
            raise ValueError(
                f"metrics: {name} needs features, and {path} has none; make it by eval/make_reference.py with "
                "num_features, or name the images themselves."
            )


def check_counts(
    names: Sequence[str], samples: int, reference: int | None, inception_splits: int, kid_subset_size: int
) -> None:
    """Refuse numbers of images that are too small for a metric, before anything is sampled.

    Args:
        names: Keys of `METRICS`.
        samples: Number of samples.
        reference: Number of the reference's images, or of its features if it has no images; `None` if unknown.
        inception_splits: Splits of the Inception Score.
        kid_subset_size: Images of each set in a subset of KID.

    Raises:
        ValueError: If there are too few; says how many there are and how many are needed.
    """
    settings = MetricSettings(inception_splits=inception_splits, kid_subset_size=kid_subset_size)
    for name in names:
        metric, setting = METRICS[name], ""
        least = metric.least_images
        if isinstance(least, str):
            least, setting = getattr(settings, least), f" ({least})"
        sides = {"samples": samples, **({} if metric.logits else {"images in the reference": reference})}
        for side, count in sides.items():
            if count is not None and count < least:
                raise ValueError(f"metrics: {name} takes at least {least} {side}{setting}; there are {count}.")


def compute_metrics(
    names: Sequence[str],
    samples: FeatureSummary,
    reference: FeatureSummary,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Compute metrics, and the standard deviation of those that are averages.

    Args:
        names: Keys of `METRICS`.
        samples: Summary of the samples.
        reference: Summary of the reference.
        kid_subsets: Subsets of KID.
        kid_subset_size: Images of each set in one.
        device: Where to compute with features.

    Raises:
        ValueError: If there are fewer images than a metric needs, dimensions differ, or a number is not finite.
    """
    settings = MetricSettings(kid_subsets=kid_subsets, kid_subset_size=kid_subset_size, device=device)
    values = {}
    for name in names:
        value = METRICS[name].compute(samples, reference, settings)
        if isinstance(value, tuple):
            values[name], values[f"{name}_std"] = value
        else:
            values[name] = value
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: the features are too large to be compared.")
    # Further digits depend on the number of threads.
    return {name: float(f"{value:.9g}") for name, value in values.items()}


def label(name: str, count: int, extractor: FeatureExtractor) -> str:
    """Return a metric's name for a table, with the number of samples, and the extractor where it is not Inception.

    The number of samples belongs to the name, because FID rises as it falls.
    """
    metric = METRICS[name]
    if extractor.is_inception:
        title = metric.title or name
    else:
        title = f"{metric.general_title or name}({extractor.name.split()[0]})"
    return f"{title}-{count // 1000}k" if count % 1000 == 0 else f"{title}-{count}"


def warnings_about(samples: FeatureSummary, reference: FeatureSummary, names: Sequence[str]) -> list[str]:
    """Return notes on what limits the numbers."""
    warnings = []
    count = samples.provenance["count"]
    if count < FULL_COUNT and any(METRICS[name].statistics for name in names):
        warnings.append(f"{count} samples: not comparable with numbers of {FULL_COUNT}, which are lower as a rule.")
    for whose, summary in (("samples'", samples), ("reference's", reference)):
        for kind, statistics in summary.statistics.items():
            if statistics.rank < len(statistics.mean):
                warnings.append(
                    f"The covariance of the {whose} {kind} features is rank-deficient: rank {statistics.rank} in "
                    f"{len(statistics.mean)} dimensions, of {statistics.count or 'an unknown number of'} images."
                )
    if not reference.provenance:
        warnings.append("The reference does not say how it was made: its extractor and resizing are not verified.")
    formats = [summary.provenance.get("format", "") for summary in (samples, reference)]
    if all(formats) and formats[0] != formats[1] and any("JPEG" in some for some in formats):
        warnings.append(f"JPEG on one side ({' against '.join(formats)}): its compression changes features too.")
    shapes = [tuple(summary.provenance.get("shape", ())) for summary in (samples, reference)]
    if all(shapes) and shapes[0] != shapes[1]:
        warnings.append(f"Samples are of shape {shapes[0]}, the reference's images {shapes[1]}.")
    return warnings


def format_table(values: dict[str, float], record: dict[str, Any], extractor: FeatureExtractor) -> str:
    """Return a table of the numbers and of how they were made, in two columns.

    Args:
        values: The values that `compute_metrics` returns.
        record: The provenance of `samples` and `reference`, `settings` and `warnings`.
        extractor: The extractor.
    """
    samples, reference = record["samples"], record["reference"]
    rows = []
    for name, value in values.items():
        if not name.endswith("_std"):
            spread = f" ± {values[f'{name}_std']:.4g}" if f"{name}_std" in values else ""
            rows.append((label(name, samples["count"], extractor), f"{value:.6g}{spread}"))
    features = record["settings"]["reference_features"]
    rows += [
        ("extractor", f"{extractor.name}, weights {extractor.fingerprint}"),
        ("resize", extractor.resize),
        ("samples", f"{samples['count']}, {samples['images']}"),
        ("sampler", samples.get("sampler", "unknown")),
        ("reference", f"{reference.get('count', 'unknown number')}, {reference['path']}"),
        *([("its features", f"{features}, for precision, recall and KID")] if features else []),
        *(("note", text) for text in record["warnings"]),
    ]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)
