"""Compute FID, sFID, Inception Score, precision, recall and KID of samples against a reference.

    python eval/fid.py --model outputs/digits --num_samples 1797 --reference digits --extractor pixels --output a.json

Guidance and steps are those saved in the pipeline; papers report FIDs of ImageNet at about --guidance_scale 1.5 and
--num_inference_steps 250. Metrics for which there are too few images are left out with a note, unless --metrics
names them.

Prints a table and writes the numbers with all that made them to --output, a picture of some samples and some of the
reference's images beside it, and with --model the samples to a folder beside it. An interrupted run continues when the
same command is given again. `accelerate launch eval/fid.py` shares the work among processes.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from ..data.raw_images import (
    NpzImages,
    RawImageArguments,
    RawImages,
    SubsetImages,
    open_images,
    refuse_preparation,
    save_npz_images,
)
from ..metrics.extraction import summarize
from ..metrics.extractors import ExtractorArguments, FeatureExtractor, build_extractor
from ..metrics.features import FeatureSummary, has_statistics, load_summary
from ..metrics.registry import (
    FULL_COUNT,
    METRICS,
    check_counts,
    check_metrics,
    check_reference,
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
from ..utils.arguments import exit_on_error, parse_arguments, require_at_least
from ..utils.files import check_new, check_writable, write_atomically


@dataclass
class FidArguments:
    """What to compare, and how."""

    reference: str = field(
        metadata={
            "help": "Folder of images, data set (file, Hub name or 'digits'), .npz of ADM's tools, or statistics of "
            "eval/make_reference.py."
        }
    )
    output: Path = field(metadata={"help": "JSON file for the numbers; a picture and samples go beside it."})
    samples: str | None = field(
        default=None,
        metadata={"help": "Folder of images, .npz of ADM's layout, or --samples_dir of another run."},
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": f"Of {', '.join(METRICS)}; by default all that extractor and images allow."},
    )
    samples_npz: Path | None = field(
        default=None, metadata={"help": "Also write the samples to this .npz, for ADM's evaluation."}
    )
    num_features: int = field(
        default=10_000, metadata={"help": "Images of the reference, at random, for precision, recall and KID."}
    )
    inception_splits: int = field(default=10, metadata={"help": "Splits of the Inception Score."})
    kid_subsets: int = field(default=100, metadata={"help": "Subsets of KID."})
    kid_subset_size: int = field(default=1000, metadata={"help": "Images of each side in a subset of KID."})

    def __post_init__(self):
        require_at_least(self, 1, "num_features", "inception_splits", "kid_subsets")
        require_at_least(self, 2, "kid_subset_size")


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
        },
    )
    class_labels: Literal["balanced", "random"] = field(
        default="balanced", metadata={"help": "The classes in turn, or drawn at random for each sample."}
    )
    samples_dir: str | None = field(
        default=None, metadata={"help": "Where samples are kept; a folder beside --output by default."}
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 1, "num_samples")


@dataclass
class Reference:
    """What samples are compared with: images, or a file of their statistics, or both.

    Args:
        path: The path or name that was given.
        images: The images; `None` if there are only statistics.
        statistics: Statistics from a file; `None` if there are only images.
    """

    path: str
    images: RawImages | None = None
    statistics: FeatureSummary | None = None

    @classmethod
    def open(cls, path: str, image_args: RawImageArguments) -> "Reference":
        """Open a file of statistics, or images in any form that `open_images` takes.

        Raises:
            FileNotFoundError: If a path does not exist.
            ValueError: If nothing can be read there.
        """
        if not has_statistics(Path(path)):
            return cls(path, images=open_images(path, image_args))
        refuse_preparation(image_args, Path(path))
        return cls(path, _images_beside(Path(path)), load_summary(Path(path)))

    def check(self, metrics: Sequence[str], extractor: FeatureExtractor) -> None:
        """Refuse statistics of another extractor, or without what the metrics need.

        Raises:
            ValueError: If they differ; names what differs or is missing.
        """
        if self.statistics is not None:
            check_reference(self.path, self.statistics, metrics, extractor, has_images=self.images is not None)

    def count_features(self, limit: int) -> int | None:
        """Return the number of features to compare with, of at most `limit` images; `None` for no features."""
        if self.statistics is not None and self.statistics.features is not None:
            return len(self.statistics.features)
        return min(limit, len(self.images)) if self.images is not None else None

    def summarize(
        self, extractor: FeatureExtractor, statistics: Sequence[str], num_features: int, **kwargs: Any
    ) -> FeatureSummary | None:
        """Return the statistics and features asked for, from the file if it has them; see `extraction.summarize`."""
        kwargs = {"desc": "Reference", **kwargs}
        if self.images is None:
            return self.statistics
        if self.statistics is None:
            return summarize(self.images, extractor, statistics, num_features, **kwargs)
        if num_features and self.statistics.features is None:
            beside = summarize(self.images, extractor, (), num_features, **kwargs)
            self.statistics.features = beside.features if beside else None
        return self.statistics


def _images_beside(path: Path) -> NpzImages | None:
    """Open the images that ADM's reference files hold beside the statistics."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            if "arr_0" in archive.files:
                return NpzImages(path)
    return None


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
    metrics = args.metrics or [name for name, metric in METRICS.items() if metric.kind in extractor.provides]
    check_metrics(metrics, extractor)
    reference = Reference.open(args.reference, image_args)
    reference.check(metrics, extractor)
    pipe: Any = None
    samples: Any = None
    if args.samples is None:
        pipe = load_pipeline(sampling_args, PartialState().device)
        num_samples = sampling_args.num_samples or FULL_COUNT
    else:
        samples = open_samples(args.samples, sampling_args.num_samples, image_args)
        num_samples = len(samples)
    num_reference = reference.count_features(args.num_features)
    metrics, notes = _check_counts(args, metrics, num_samples, num_reference)

    statistics = [METRICS[name].statistics for name in metrics if METRICS[name].statistics]
    with_features = any(METRICS[name].features for name in metrics)
    options: dict[str, Any] = {
        "extractor": extractor,
        "statistics": statistics,
        "num_workers": num_workers,
        "feature_folder": args.output.parent,
    }
    expected = reference.summarize(num_features=args.num_features if with_features else 0, **options)
    if pipe is not None:
        samples = draw_samples(pipe, sampling_args, num_samples, args.output)
        notes += _notes_on_sampling(pipe, sampling_args)
    splits = args.inception_splits if "inception_score" in metrics else 0
    num_features = None if with_features else 0
    found = summarize(samples, num_features=num_features, inception_splits=splits, desc="Samples", **options)
    if expected is None or found is None:  # not the main process
        return None

    _check_dimensions(args.reference, expected, found)
    device = PartialState().device
    values = compute_metrics(metrics, found, expected, args.kid_subsets, args.kid_subset_size, device)
    record = {
        "kind": "fid",
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
        "warnings": [*notes, *warnings_about(found, expected, metrics)],
        "versions": {package: version(package) for package in ("sdt_diffusion", "torch", "diffusers")},
    }
    # Write the numbers first, so that an error in what follows does not lose them.
    write_atomically(args.output, lambda path: path.write_text(json.dumps(record, indent=2)))
    if args.samples_npz:
        write_atomically(args.samples_npz, lambda path: save_npz_images(path, samples))
    write_atomically(args.output.with_suffix(".png"), side_by_side(samples, reference.images).save)
    return format_table(values, record, extractor)


def open_samples(name: str, count: int | None, image_args: RawImageArguments) -> RawImages:
    """Open samples of another run, of a folder of images, or of an `.npz`; `count` of them at random, or all."""
    if is_sample_folder(Path(name)):
        images: RawImages = SampleFolder(Path(name))
    else:
        mode = None if Path(name).suffix.lower() == ".npz" else image_args.image_mode
        images = open_images(name, RawImageArguments(image_mode=mode))
    return images if count in (None, len(images)) else SubsetImages(images, count)


def draw_samples(pipe: SDTPipeline, args: FidSamplingArguments, num_samples: int, output: Path) -> SampleFolder:
    """Sample from the pipeline into `samples_dir`, or into a folder beside the output."""
    classes = range(pipe.transformer.config.num_classes)
    if args.class_labels == "balanced":
        labels = class_labels_for(num_samples, classes)
    else:
        labels = random_class_labels(num_samples, classes, args.seed)
    folder = Path(args.samples_dir) if args.samples_dir else output.with_suffix(".samples")
    settings, backend = args.settings(pipe), args.attention_backend
    return sample_into(folder, pipe, labels, settings, args.batch_size, attention_backend=backend)


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


def _check_counts(
    args: FidArguments, metrics: list[str], num_samples: int, num_reference: int | None
) -> tuple[list[str], list[str]]:
    """Leave out metrics that need more images than there are, unless the user named them.

    Returns:
        The metrics that remain, and a note for each that does not.

    Raises:
        ValueError: If a metric that was asked for needs more images, or none remains.
    """
    counts = (num_samples, num_reference, args.inception_splits, args.kid_subset_size)
    if args.metrics:
        check_counts(metrics, *counts)
    remaining, notes = [], []
    for name in metrics:
        try:
            check_counts([name], *counts)
            remaining.append(name)
        except ValueError as error:
            notes.append(f"Left out: {str(error).removeprefix('metrics: ')}")
    if not remaining:
        check_counts(metrics, *counts)
    return remaining, notes


def _notes_on_sampling(pipe: SDTPipeline, args: FidSamplingArguments) -> list[str]:
    """Return a note if neither the pipeline nor the arguments set the guidance."""
    if args.guidance_scale is not None or pipe.config.guidance_scale is not None:
        return []
    guidance = args.settings(pipe)["guidance_scale"]
    return [f"The pipeline has no guidance_scale saved: {guidance:g} was used; FIDs are best at about 1.5."]


def _check_dimensions(path: str, expected: FeatureSummary, found: FeatureSummary) -> None:
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
    with exit_on_error(ValueError, OSError):
        with state.local_main_process_first():  # one process downloads the weights
            extractor = build_extractor(extractor_args.extractor, extractor_args.extractor_weights, state.device)
        table = compare(args, sampling_args, extractor, image_args, extractor_args.dataloader_num_workers)
    if table is not None:
        print(f"\n{table}\n\nWritten to {args.output}.")


if __name__ == "__main__":
    main()
