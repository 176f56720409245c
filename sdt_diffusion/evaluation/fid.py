"""Compute FID, sFID, Inception Score, precision, recall and KID of samples against a reference.

    python eval/fid.py --model outputs/digits --num_samples 1797 --reference digits --extractor pixels --output a.json

Guidance and steps are those saved in the pipeline; papers report FIDs of ImageNet at about --guidance_scale 1.5 and
--num_inference_steps 250. Metrics for which there are too few images are left out with a note, unless --metrics
names them.

Prints a table and writes the numbers with all that made them to --output, a picture of some samples and some of the
reference's images beside it, and with --model the samples to a folder beside it. An interrupted run continues when the
same command is given again. `accelerate launch eval/fid.py` shares the work among processes.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from ..data.raw_images import (
    RawImageArguments,
    RawImages,
    SubsetImages,
    open_images,
    refuse_preparation,
    save_npz_images,
)
from ..metrics.extraction import Reference, measure_dims, summarize
from ..metrics.extractors import ExtractorArguments, FeatureExtractor
from ..metrics.features import MAX_FEATURES, without_machine
from ..metrics.registry import (
    FULL_COUNT,
    METRICS,
    MetricSettings,
    check_counts,
    check_metrics,
    compute_metrics,
    format_table,
    label,
    warnings_about,
)
from ..plots import image_grid
from ..sampling.folder import SampleFolder, is_sample_folder, sample_into
from ..sampling.generate import class_labels_for, random_class_labels
from ..sampling.settings import SamplingArguments, load_pipeline
from ..sdt import SDTPipeline
from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import check_new, check_writable, require_space, write_atomically, write_json
from ..utils.ranges import CheckedArguments, between
from .label_accuracy import shape_of_samples

#: Ranges of the settings of metrics, by name.
_OF = {each.name: each.metadata for each in fields(MetricSettings)}


@dataclass(kw_only=True)
class MetricArguments(CheckedArguments):
    """What to compare samples with, and by which metrics."""

    reference: str = field(
        metadata={
            "help": "Folder of images, data set (file, Hub name or 'digits'), .npz of ADM's tools, or statistics of "
            "eval/make_reference.py."
        }
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": f"Of {', '.join(METRICS)}; by default all that extractor and images allow."},
    )
    num_features: int = field(
        default=10_000,
        metadata={"help": "Images of the reference, at random, for precision, recall and KID."}
        | between(1, MAX_FEATURES),
    )
    inception_splits: int = field(
        default=10, metadata={"help": "Splits of the Inception Score.", **_OF["inception_splits"]}
    )
    kid_subsets: int = field(default=100, metadata={"help": "Subsets of KID.", **_OF["kid_subsets"]})
    kid_subset_size: int = field(
        default=1000, metadata={"help": "Images of each side in a subset of KID.", **_OF["kid_subset_size"]}
    )


@dataclass(kw_only=True)
class FidArguments(MetricArguments):
    """What to compare, and where to write the numbers."""

    output: Path = field(metadata={"help": "JSON file for the numbers; a picture and samples go beside it."})
    samples: str | None = field(
        default=None,
        metadata={"help": "Folder of images, .npz of ADM's layout, or --samples_dir of another run."},
    )
    samples_npz: Path | None = field(
        default=None, metadata={"help": "Also write the samples to this .npz, for ADM's evaluation."}
    )


@dataclass(kw_only=True)
class FidSamplingArguments(SamplingArguments):
    """How to sample, with --model."""

    model: str | None = field(  # type: ignore[assignment]  # here, samples may be given in its place
        default=None, metadata={"help": "Folder or Hub name of a saved pipeline."}
    )
    num_samples: int | None = field(
        default=None,
        metadata={
            "help": f"Samples; {FULL_COUNT} with --model, all there are with --samples by default.",
            "aliases": ["--num_images"],
        }
        | between(1, MAX_FEATURES),
    )
    class_labels: Literal["balanced", "random"] = field(
        default="balanced",
        metadata={
            "help": "The classes in turn, of which the first have a sample more if the number does not divide, or "
            "drawn at random for each sample."
        },
    )
    samples_dir: str | None = field(
        default=None, metadata={"help": "Where samples are kept; a folder beside --output by default."}
    )


def compare(
    args: FidArguments,
    sampling_args: FidSamplingArguments,
    extractor: FeatureExtractor,
    image_args: RawImageArguments,
    num_workers: int = 0,
) -> str | None:
    """Compare samples with a reference and write `output`, a picture beside it, and, if asked for, an `.npz`.

    Called by all processes. Arguments are checked before anything is sampled.

    Args:
        args: What to compare.
        sampling_args: How to sample, if there are no samples yet.
        extractor: Computes the features.
        image_args: How to read the reference's images.
        num_workers: Processes that read images.

    Returns:
        The table on the main process, `None` on the others.

    Raises:
        ValueError: If the arguments do not fit together, or images or statistics cannot be used.
    """
    _check_arguments(args, sampling_args)
    possible = [name for name, metric in METRICS.items() if metric.kind in extractor.provides]
    metrics = list(dict.fromkeys(args.metrics)) or possible
    check_metrics(metrics, extractor)
    for_reference, for_samples = _divide(image_args, args)
    reference = Reference.open(args.reference, for_reference)
    metrics, notes = _choose(metrics, bool(args.metrics), lambda names: reference.check(names, extractor))
    pipe: Any = None
    samples: Any = None
    if args.samples is None:
        pipe = load_pipeline(sampling_args, PartialState().device)
        num_samples = sampling_args.num_samples or FULL_COUNT
        shape = shape_of_samples(pipe, sampling_args.height, sampling_args.width)
    else:
        samples = open_samples(args.samples, sampling_args.num_samples, for_samples)
        num_samples, shape = len(samples), samples[0].shape
    num_reference = reference.count_features(args.num_features)
    counts = (num_samples, num_reference, args.inception_splits, args.kid_subset_size)
    metrics, too_few = _choose(metrics, bool(args.metrics), lambda names: check_counts(names, *counts))
    notes += too_few
    dims = measure_dims(extractor, shape)
    check_dimensions(args.reference, reference.dims(extractor), dims)

    statistics = [METRICS[name].statistics for name in metrics if METRICS[name].statistics]
    with_features = any(METRICS[name].features for name in metrics)
    num_kept = num_samples + (num_reference or 0) if with_features else 0
    _check_space(args, sampling_args, (num_samples, *shape), num_kept * dims.get("pool", 0))
    options: dict[str, Any] = {
        "extractor": extractor,
        "statistics": statistics,
        "num_workers": num_workers,
        "feature_folder": args.output.parent,
    }
    expected = reference.summarize(num_features=args.num_features if with_features else 0, **options)
    if pipe is not None:
        samples = draw_samples(pipe, sampling_args, num_samples, _samples_folder(args, sampling_args))
        notes += _notes_on_sampling(pipe, sampling_args, num_samples)
    splits = args.inception_splits if "inception_score" in metrics else 0
    num_features = None if with_features else 0
    found = summarize(samples, num_features=num_features, inception_splits=splits, desc="Samples", **options)
    if expected is None or found is None:  # not the main process
        return None

    device = PartialState().device
    values = compute_metrics(metrics, found, expected, args.kid_subsets, args.kid_subset_size, device)
    record = {
        "kind": "fid",
        **values,
        "labels": {name: label(name, len(samples), extractor) for name in metrics},
        "samples": without_machine({**found.provenance, **({"model": sampling_args.model} if pipe else {})}),
        "reference": without_machine({**expected.provenance, "path": args.reference}),
        "settings": {
            "inception_splits": args.inception_splits,
            "kid_subsets": args.kid_subsets,
            "kid_subset_size": args.kid_subset_size,
            "reference_features": num_reference if with_features else 0,
        },
        "warnings": [*notes, *warnings_about(found, expected, metrics)],
        "versions": {package: version(package) for package in ("sdt_diffusion", "torch", "diffusers")},
    }
    # Write the numbers first, so that an error in what follows does not lose them.
    write_json(args.output, record)
    if args.samples_npz:
        write_atomically(args.samples_npz, lambda path: save_npz_images(path, samples))
    write_atomically(args.output.with_suffix(".png"), side_by_side(samples, reference.images).save)
    return format_table(values, record, extractor)


def _divide(image_args: RawImageArguments, args: FidArguments) -> tuple[RawImageArguments, RawImageArguments]:
    """Return how to read the images of the reference, and how to read samples that are given.

    Images of the reference are prepared as asked for, and samples only read in that mode, since they have the size to
    be compared. Where the reference holds statistics or arrays, which stay as they are, samples are prepared.

    Raises:
        ValueError: If there is nothing to prepare on either side.
    """
    samples_take_them = args.samples is not None and _are_prepared(args.samples)
    if _are_prepared(args.reference):
        mode = image_args.image_mode if samples_take_them else None
        return image_args, RawImageArguments(image_mode=mode)
    if not samples_take_them:
        refuse_preparation(image_args, Path(args.reference))
    return RawImageArguments(), image_args


def _are_prepared(name: str) -> bool:
    path = Path(name).expanduser()
    return path.suffix.lower() not in (".npz", ".safetensors", ".pkl") and not is_sample_folder(path)


def open_samples(name: str, count: int | None, image_args: RawImageArguments) -> RawImages:
    """Open samples of another run, of a folder of images, or of an `.npz`; `count` of them at random, or all."""
    path = Path(name)
    images = SampleFolder(path) if is_sample_folder(path) else open_images(name, image_args)
    return images if count in (None, len(images)) else SubsetImages(images, count)


def _samples_folder(args: FidArguments, sampling_args: FidSamplingArguments) -> Path:
    return Path(sampling_args.samples_dir or args.output.with_suffix(".samples"))


def _check_space(
    args: FidArguments, sampling_args: FidSamplingArguments, samples: Sequence[int], num_values: int
) -> None:
    """Refuse an evaluation whose samples and features the disks cannot hold.

    Args:
        args: Where the results go.
        sampling_args: Where the samples go.
        samples: Shape of all samples together.
        num_values: Values of all features that are kept, of four bytes each.
    """
    sizes = {args.output.parent: 4 * num_values}
    if args.samples is None:
        folder = _samples_folder(args, sampling_args)
        there = sum(file.stat().st_size for file in folder.glob("batch-*.npy"))
        sizes[folder] = max(0, prod(samples) - there)
        if PartialState().is_main_process:
            check_writable(folder)
    if args.samples_npz is not None:
        sizes[args.samples_npz.parent] = sizes.get(args.samples_npz.parent, 0) + 3 * prod(samples[:3])
    for folder, size in sizes.items():
        require_space(folder, size, "What this evaluation keeps there")


def draw_samples(pipe: SDTPipeline, args: FidSamplingArguments, num_samples: int, folder: Path) -> SampleFolder:
    """Sample from the pipeline into a folder, starting from what it holds already."""
    classes = range(pipe.transformer.config.num_classes)
    if args.class_labels == "balanced":
        labels = class_labels_for(num_samples, classes)
    else:
        labels = random_class_labels(num_samples, classes, args.seed)
    attention = args.attention_record()
    return sample_into(folder, pipe, labels, args.settings(pipe), args.batch_size, attention=attention)


def side_by_side(samples: RawImages, reference: RawImages | None, columns: int = 12, rows: int = 3) -> Image.Image:
    """Draw samples above images of the reference, to reveal a wrong range, crop or channel order."""
    images, texts = [], []
    for name, source in (("samples", samples), ("reference", reference)):
        if source is None:
            continue
        if len(images) % columns:  # begin the reference in a new row
            blank = Image.new("RGB", images[0].size, "white")
            images += [blank] * (columns - len(images) % columns)
            texts += ["samples"] * (len(images) - len(texts))
        shown = np.linspace(0, len(source) - 1, min(len(source), columns * rows)).astype(int)
        images += [_picture(source[int(index)]) for index in shown]
        texts += [name] * len(shown)
    return image_grid(images, texts, columns)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])


def _check_arguments(args: FidArguments, sampling_args: FidSamplingArguments) -> None:
    if (args.samples is None) == (sampling_args.model is None):
        raise ValueError("Give either model, to sample from, or samples.")
    if args.samples is not None:
        for each in fields(sampling_args):
            if each.name != "num_samples" and getattr(sampling_args, each.name) != each.default:
                raise ValueError(f"{each.name} is for sampling from a model; it has no effect on given samples.")
    outputs = [(args.output, ".json"), (args.output.with_suffix(".png"), ".png")]
    if args.samples_npz is not None:
        outputs.append((args.samples_npz, ".npz"))
    for path, ending in outputs:
        check_new(path, ending)
    for path, _ in outputs:
        check_writable(path.parent)


def _choose(
    metrics: Sequence[str], asked_for: bool, check: Callable[[Sequence[str]], None]
) -> tuple[list[str], list[str]]:
    """Leave out metrics that a check refuses, unless the user named them.

    Returns:
        The metrics that remain, and a note for each that does not.

    Raises:
        ValueError: If a metric that was asked for is refused, or none remains.
    """
    if asked_for:
        check(metrics)
    remaining, notes = [], []
    for name in metrics:
        try:
            check([name])
            remaining.append(name)
        except ValueError as error:
            notes.append(f"Left out: {str(error).removeprefix('metrics: ')}")
    if not remaining:
        check(metrics)
    return remaining, notes


def _notes_on_sampling(pipe: SDTPipeline, args: FidSamplingArguments, num_samples: int) -> list[str]:
    """Return notes if nothing sets the guidance, or if the classes cannot have equally many samples."""
    notes, guidance = [], args.settings(pipe)["guidance_scale"]
    if args.guidance_scale is None and pipe.config.guidance_scale is None and pipe.guider is None:
        notes.append(f"The pipeline has no guidance_scale saved: {guidance:g} was used; FIDs are best at about 1.5.")
    num_classes = pipe.transformer.config.num_classes
    more = num_samples % num_classes
    if args.class_labels == "balanced" and more:
        notes.append(f"{num_samples} samples of {num_classes} classes: the first {more} have one sample more.")
    return notes


def check_dimensions(path: str, expected: dict[str, int], found: dict[str, int]) -> None:
    """Refuse a reference whose features have other dimensions than those of samples.

    Raises:
        ValueError: Names the reference, the kind of features, and both dimensions.
    """
    for kind in sorted(set(expected) & set(found)):
        if expected[kind] != found[kind]:
            raise ValueError(
                f"{path}: its {kind} features have {expected[kind]} dimensions, those of the samples {found[kind]}."
            )


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    types = (FidArguments, FidSamplingArguments, ExtractorArguments, RawImageArguments)
    args, sampling_args, extractor_args, image_args = parse_arguments(types, argv, description=__doc__)
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.local_main_process_first():  # one process downloads the weights
        extractor = extractor_args.build(state.device)
    table = compare(args, sampling_args, extractor, image_args, extractor_args.dataloader_num_workers)
    if table is not None:
        print(f"\n{table}\n\nWritten to {args.output}.")


if __name__ == "__main__":
    main()
