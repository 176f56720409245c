"""FID, sFID, Inception Score, precision, recall and KID of samples against a reference.

    python eval/fid.py --model outputs/digits --num_samples 1797 --num_inference_steps 25 \\
        --reference digits --extractor pixels --output outputs/digits/fid.json

Prints a table and writes the numbers with all that made them to --output, some samples and some of the reference's
images to a picture beside it, and with --model the samples to a folder beside it. A run that is interrupted goes on
where it stopped when the same command is given again. `accelerate launch eval/fid.py` shares the work among processes.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from ..data.raw_images import RawImageArguments, RawImages, SubsetImages, open_images, save_npz_images
from ..metrics.extraction import summarize
from ..metrics.extractors import ExtractorArguments, FeatureExtractor, build_extractor
from ..metrics.registry import (
    FULL_COUNT,
    METRICS,
    check_counts,
    check_metrics,
    compute_metrics,
    format_table,
    label,
    warnings_about,
)
from ..plots import image_grid
from ..sampling.arguments import SamplingArguments, load_pipeline
from ..sampling.folder import SampleFolder, is_sample_folder, sample_into
from ..sampling.generate import class_labels_for, random_class_labels
from ..sdt import SDTPipeline
from ..utils.arguments import errors_in_a_line, parse_arguments, require_at_least
from ..utils.files import check_new, check_writable, write_atomically
from .make_reference import Reference


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


@dataclass(kw_only=True)
class FidSamplingArguments(SamplingArguments):
    """How to sample, with --model."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub name of a saved pipeline."})
    num_samples: int | None = field(
        default=None,
        metadata={
            "help": f"Samples; {FULL_COUNT} with --model, all there are with --samples by default.",
            "aliases": ["--num_images"],
        },
    )
    class_labels: Literal["balanced", "random"] = field(
        default="balanced", metadata={"help": "The classes in turn, or each sample's drawn by its seed."}
    )
    samples_dir: str | None = field(
        default=None, metadata={"help": "Where samples are kept; a folder beside --output by default."}
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 1, "num_samples")


def compare(
    args: FidArguments,
    sampling_args: FidSamplingArguments,
    extractor: FeatureExtractor,
    image_args: RawImageArguments,
    num_workers: int = 0,
) -> str | None:
    """Compares samples with a reference and writes `--output`, a picture beside it, and, if asked for, an `.npz`.

    Called by all processes. What can be refused is refused before anything is sampled.

    Args:
        args: What to compare.
        sampling_args: How to sample, if there are no samples yet.
        extractor: What to compare by.
        image_args: How to read the reference's images.
        num_workers: Processes that read images.

    Returns:
        The table, on the main process.

    Raises:
        ValueError: If the arguments do not fit together, or images or statistics cannot be used.
    """
    _check_arguments(args, sampling_args)
    metrics = args.metrics or [name for name, needs in METRICS.items() if needs.kind in extractor.provides]
    check_metrics(metrics, extractor)
    reference = Reference.open(args.reference, image_args)
    reference.check(metrics, extractor)
    pipe = samples = None
    if sampling_args.model is not None:
        pipe = load_pipeline(sampling_args, PartialState().device)
        num_samples = sampling_args.num_samples or FULL_COUNT
    else:
        samples = open_samples(args.samples, sampling_args.num_samples, image_args)
        num_samples = len(samples)
    num_reference = reference.count_features(args.num_features)
    check_counts(metrics, num_samples, num_reference, args.inception_splits, args.kid_subset_size)

    statistics = [METRICS[name].statistics for name in metrics if METRICS[name].statistics]
    with_features = any(METRICS[name].features for name in metrics)
    how = {"extractor": extractor, "statistics": statistics, "num_workers": num_workers}
    how["feature_folder"] = args.output.parent
    expected = reference.summarise(num_features=args.num_features if with_features else 0, **how)
    if samples is None:
        samples = draw_samples(pipe, sampling_args, num_samples, args.output)
    splits = args.inception_splits if "inception_score" in metrics else 0
    num_features = None if with_features else 0
    found = summarize(samples, num_features=num_features, inception_splits=splits, desc="Samples", **how)
    if not PartialState().is_main_process:
        return None

    _check_dimensions(args.reference, expected, found)
    device = PartialState().device
    values = compute_metrics(metrics, found, expected, args.kid_subsets, args.kid_subset_size, device)
    record = {
        **values,
        "labels": {name: label(name, len(samples), extractor) for name in metrics},
        "samples": {**found.provenance, **({"model": sampling_args.model} if pipe else {})},
        "reference": {"path": args.reference, **expected.provenance},
        "settings": {
            "inception_splits": args.inception_splits,
            "kid_subsets": args.kid_subsets,
            "kid_subset_size": args.kid_subset_size,
            "reference_features": num_reference if with_features else 0,
        },
        "warnings": warnings_about(found, expected, metrics),
        "versions": {package: version(package) for package in ("sdt_diffusion", "torch", "diffusers")},
    }
    # The numbers first: whatever befalls the rest, they are there.
    write_atomically(args.output, lambda path: path.write_text(json.dumps(record, indent=2)))
    if args.samples_npz:
        write_atomically(args.samples_npz, lambda path: save_npz_images(path, samples))
    write_atomically(args.output.with_suffix(".png"), side_by_side(samples, reference.images).save)
    return format_table(values, record, extractor)


def open_samples(name: str, count: int | None, image_args: RawImageArguments) -> RawImages:
    """Samples as they are: of another run, from a folder of images, or from an `.npz`; `count` of them at random."""
    if is_sample_folder(Path(name)):
        images = SampleFolder(Path(name))
    else:
        mode = None if Path(name).suffix.lower() == ".npz" else image_args.image_mode
        images = open_images(name, RawImageArguments(image_mode=mode))
    return images if count in (None, len(images)) else SubsetImages(images, count)


def draw_samples(pipe: SDTPipeline, args: FidSamplingArguments, num_samples: int, output: Path) -> SampleFolder:
    """Samples of the pipeline in `--samples_dir`, or in a folder beside the output."""
    classes = range(pipe.transformer.config.num_classes)
    if args.class_labels == "balanced":
        labels = class_labels_for(num_samples, classes)
    else:
        labels = random_class_labels(num_samples, classes, args.seed)
    folder = Path(args.samples_dir) if args.samples_dir else output.with_suffix(".samples")
    return sample_into(folder, pipe, labels, args.settings(pipe), args.batch_size)


def side_by_side(samples: RawImages, reference: RawImages | None, columns: int = 12, rows: int = 3) -> Image.Image:
    """A picture of some samples above some images of the reference: a wrong range, crop or channel order shows."""
    images, texts = [], []
    for name, source in (("samples", samples), ("reference", reference)):
        if source is None:
            continue
        if len(images) % columns:  # a row of its own for the reference
            blank = Image.new("RGB", images[0].size, "white")
            images += [blank] * (columns - len(images) % columns)
            texts += ["samples"] * (len(images) - len(texts))
        shown = np.linspace(0, len(source) - 1, min(len(source), columns * rows)).astype(int)
        images += [_picture(source[int(index)]) for index in shown]
        texts += [name] * len(shown)
    return image_grid(images, texts, columns)


def _picture(pixels):
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])


def _check_arguments(args, sampling_args):
    if (args.samples is None) == (sampling_args.model is None):
        raise ValueError("Give either --model, to sample from, or --samples.")
    if args.samples is not None:
        for field in fields(sampling_args):
            if field.name != "num_samples" and getattr(sampling_args, field.name) != field.default:
                raise ValueError(f"--{field.name} is for sampling by --model; the --samples are what they are.")
    outputs = [(args.output, ".json"), (args.output.with_suffix(".png"), ".png")]
    if args.samples_npz is not None:
        outputs.append((args.samples_npz, ".npz"))
    for path, ending in outputs:
        check_new(path, ending)
    for path, _ in outputs:
        check_writable(path.parent)


def _check_dimensions(path, expected, found):
    for kind, statistics in found.statistics.items():
        dims = len(expected.statistics[kind].mean), len(statistics.mean)
        if dims[0] != dims[1]:
            raise ValueError(f"{path}: its {kind} features have {dims[0]} dimensions, those of the samples {dims[1]}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    types = (FidArguments, FidSamplingArguments, ExtractorArguments, RawImageArguments)
    args, sampling_args, extractor_args, image_args = parse_arguments(types, argv, description=__doc__)
    state = PartialState(cpu=not torch.cuda.is_available())
    with errors_in_a_line(ValueError, OSError):
        with state.local_main_process_first():  # weights may have to be downloaded
            extractor = build_extractor(extractor_args.extractor, extractor_args.extractor_weights, state.device)
        table = compare(args, sampling_args, extractor, image_args, extractor_args.dataloader_num_workers)
    if table is not None:
        print(f"\n{table}\n\nWritten to {args.output}.")
