"""Samples against a reference: which metrics need what, and their numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..utils.fingerprint import differences
from .extractors import FeatureExtractor
from .frechet import frechet_distance
from .kid import kernel_distance
from .precision_recall import NEIGHBORHOOD, precision_recall
from .summary import FeatureSummary


@dataclass(frozen=True)
class Needs:
    """What a metric needs: of which features it takes Gaussians, or whether it takes the features themselves."""

    statistics: str | None = None
    features: bool = False
    logits: bool = False

    @property
    def kind(self) -> str:
        """The kind of features."""
        return self.statistics or ("logits" if self.logits else "pool")


METRICS = {
    "fid": Needs(statistics="pool"),
    "sfid": Needs(statistics="spatial"),
    "inception_score": Needs(logits=True),
    "precision": Needs(features=True),
    "recall": Needs(features=True),
    "kid": Needs(features=True),
}

#: Images of a full evaluation.
FULL_COUNT = 50_000


def check_metrics(names: Sequence[str], extractor: FeatureExtractor) -> None:
    """Refuses metrics that do not exist or that the extractor has no features for.

    Raises:
        ValueError: Says which are possible.
    """
    possible = [name for name, needs in METRICS.items() if needs.kind in extractor.provides]
    for name in names:
        if name not in METRICS:
            raise ValueError(f"--metrics {name}: there are {', '.join(METRICS)}.")
        if name not in possible:
            raise ValueError(f"--metrics {name}: the extractor {extractor.name} gives {', '.join(possible)}.")


def check_reference(
    path: str, reference: FeatureSummary, names: Sequence[str], extractor: FeatureExtractor, has_images: bool
) -> None:
    """Refuses saved statistics that another extractor made, or that lack what the metrics need.

    Args:
        path: Of the file.
        reference: What it holds.
        names: Keys of `METRICS`.
        extractor: The extractor.
        has_images: Whether features can be extracted from images beside the statistics.

    Raises:
        ValueError: Says what differs or is missing.
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
        needs = METRICS[name]
        if needs.statistics and needs.statistics not in reference.statistics:
            raise ValueError(f"--metrics {name}: {path} has no statistics of {needs.statistics} features.")
        if needs.features and reference.features is None and not has_images:
            raise ValueError(
                f"--metrics {name}: {path} has no features; make it by eval/make_reference.py with --num_features, or "
                "name the images themselves."
            )


def check_counts(
    names: Sequence[str], samples: int, reference: int | None, inception_splits: int, kid_subset_size: int
) -> None:
    """Refuses numbers of images that are too small for a metric, before anything is sampled.

    Args:
        names: Keys of `METRICS`.
        samples: Number of samples.
        reference: Number of the reference's images, or of its features if it has no others; `None` if unknown.
        inception_splits: Splits of the Inception Score.
        kid_subset_size: Images of each set in a subset of KID.

    Raises:
        ValueError: Says what there is and what it takes.
    """
    least = {"fid": 2, "sfid": 2, "inception_score": inception_splits, "kid": kid_subset_size}
    for name in names:
        needed = least.get(name, NEIGHBORHOOD + 1)
        sides = {"samples": samples, **({} if METRICS[name].logits else {"images in the reference": reference})}
        for side, count in sides.items():
            if count is not None and count < needed:
                flag = " (--kid_subset_size)" if name == "kid" else ""
                raise ValueError(f"--metrics {name} takes at least {needed} {side}{flag}; there are {count}.")


def compute_metrics(
    names: Sequence[str],
    samples: FeatureSummary,
    reference: FeatureSummary,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """The metrics, and the spread of those that are averages.

    Args:
        names: Keys of `METRICS`.
        samples: Of the samples.
        reference: Of the reference.
        kid_subsets: Subsets of KID.
        kid_subset_size: Images of each set in one.
        device: Where to compute with features.

    Raises:
        ValueError: If there are fewer images than a metric needs, or dimensions differ.
    """
    values = {}
    for name in names:
        kind = METRICS[name].statistics
        if kind:
            values[name] = frechet_distance(samples.statistics[kind], reference.statistics[kind])
    if "inception_score" in names:
        values["inception_score"], values["inception_score_std"] = samples.inception_score
    if "precision" in names or "recall" in names:
        both = precision_recall(samples.features, reference.features, device=device)
        values |= {name: value for name, value in zip(("precision", "recall"), both, strict=True) if name in names}
    if "kid" in names:
        values["kid"], values["kid_std"] = kernel_distance(
            samples.features, reference.features, kid_subsets, kid_subset_size, device=device
        )
    # What is beyond these digits depends on how many threads made the sums.
    return {name: float(f"{value:.9g}") for name, value in values.items()}


def label(name: str, count: int, extractor: FeatureExtractor) -> str:
    """A metric's name for a table: with the number of samples, and the extractor where it is not Inception.

    FID-5k is not FID: the fewer samples, the higher it is.
    """
    title = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score", "kid": "KID"}.get(name, name)
    if not extractor.is_inception:
        title = {"fid": "FD", "inception_score": "score", "kid": "KD"}.get(name, name)
        title = f"{title}({extractor.name.split()[0]})"
    return f"{title}-{count // 1000}k" if count % 1000 == 0 else f"{title}-{count}"


def warnings_about(samples: FeatureSummary, reference: FeatureSummary, names: Sequence[str]) -> list[str]:
    """What a reader of the numbers should know."""
    warnings = []
    count = samples.provenance["count"]
    if count < FULL_COUNT and {"fid", "sfid"} & set(names):
        warnings.append(f"{count} samples: not comparable with numbers of {FULL_COUNT}, which are lower as a rule.")
    for whose, summary in (("samples'", samples), ("reference's", reference)):
        for kind, statistics in summary.statistics.items():
            if statistics.rank < len(statistics.mean):
                warnings.append(
                    f"The covariance of the {whose} {kind} features is rank-deficient: rank {statistics.rank} in "
                    f"{len(statistics.mean)} dimensions, of {statistics.count or 'an unknown number of'} images."
                )
    if not reference.provenance:
        warnings.append("The reference does not say how it was made: extractor and resizing are taken on trust.")
    formats = [summary.provenance.get("format", "") for summary in (samples, reference)]
    if all(formats) and formats[0] != formats[1] and any("JPEG" in some for some in formats):
        warnings.append(f"JPEG on one side ({' against '.join(formats)}): its traces are features too.")
    shapes = [summary.provenance.get("shape") for summary in (samples, reference)]
    if all(shapes) and shapes[0] != shapes[1]:
        warnings.append(f"Samples are of shape {tuple(shapes[0])}, the reference's images {tuple(shapes[1])}.")
    return warnings


def format_table(values: dict[str, float], record: dict[str, Any], extractor: FeatureExtractor) -> str:
    """The numbers, and how they were made, in two columns.

    Args:
        values: Of `compute_metrics`.
        record: With the provenance of `samples` and `reference`, `settings` and `warnings`.
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
