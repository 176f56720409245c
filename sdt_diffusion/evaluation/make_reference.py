"""Statistics of a reference, so that its images need not be read again for every evaluation.

    python eval/make_reference.py --images digits --extractor pixels --output outputs/digits-pixels.safetensors

The file holds means and covariances under the names of ADM's tools (mu, sigma, mu_s, sigma_s), features of some images
for precision, recall and KID, and the record of how they came about.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ..data.raw_images import NpzImages, RawImageArguments, RawImages, open_images, refuse_preparation
from ..metrics.extraction import summarize
from ..metrics.extractors import ExtractorArguments, FeatureExtractor, build_extractor
from ..metrics.features import (
    STATISTICS_KEYS,
    FeatureSummary,
    check_summary_path,
    has_statistics,
    load_summary,
    save_summary,
)
from ..metrics.registry import check_reference
from ..utils.arguments import errors_in_a_line, parse_arguments, require_at_least
from ..utils.files import check_writable


@dataclass
class Reference:
    """A reference before its features are known.

    Args:
        path: As it was named.
        images: Its images; `None` if there are only statistics.
        statistics: What a file says of them; `None` if there are only images.
    """

    path: str
    images: RawImages | None = None
    statistics: FeatureSummary | None = None

    @classmethod
    def open(cls, path: str, image_args: RawImageArguments) -> "Reference":
        """Opens a file of statistics, or images in any form that `open_images` takes.

        Raises:
            FileNotFoundError: If a path does not exist.
            ValueError: If nothing can be read there.
        """
        if not has_statistics(Path(path)):
            return cls(path, images=open_images(path, image_args))
        refuse_preparation(image_args, Path(path))
        return cls(path, _images_beside(Path(path)), load_summary(Path(path)))

    def check(self, metrics: Sequence[str], extractor: FeatureExtractor) -> None:
        """Refuses statistics of another extractor, or without what the metrics need.

        Raises:
            ValueError: Says what differs or is missing.
        """
        if self.statistics is not None:
            check_reference(self.path, self.statistics, metrics, extractor, has_images=self.images is not None)

    def count_features(self, limit: int) -> int | None:
        """How many features there will be, of at most `limit` images; `None` for none."""
        if self.statistics is not None and self.statistics.features is not None:
            return len(self.statistics.features)
        return min(limit, len(self.images)) if self.images is not None else None

    def summarise(
        self, extractor: FeatureExtractor, statistics: Sequence[str], num_features: int, **kwargs: Any
    ) -> FeatureSummary | None:
        """The statistics and features asked for, from the file where it has them; see `extraction.summarize`."""
        kwargs = {"desc": "Reference", **kwargs}
        if self.statistics is None:
            return summarize(self.images, extractor, statistics, num_features, **kwargs)
        if num_features and self.statistics.features is None:
            beside = summarize(self.images, extractor, (), num_features, **kwargs)
            self.statistics.features = beside.features if beside else None
        return self.statistics


def _images_beside(path):
    """ADM's reference files hold images beside the statistics."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            if "arr_0" in archive.files:
                return NpzImages(path)
    return None


@dataclass
class ReferenceArguments:
    """What to describe, and where to write it."""

    images: str = field(metadata={"help": "Folder of images, data set (file, Hub name or 'digits'), or .npz."})
    output: Path = field(metadata={"help": ".safetensors or .npz file."})
    num_features: int = field(
        default=10_000, metadata={"help": "Images, at random, whose features to keep; 0 for none."}
    )

    def __post_init__(self):
        require_at_least(self, 0, "num_features")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    types = (ReferenceArguments, ExtractorArguments, RawImageArguments)
    args, extractor_args, image_args = parse_arguments(types, argv, description=__doc__)
    state = PartialState(cpu=not torch.cuda.is_available())
    with errors_in_a_line(ValueError, OSError):
        check_summary_path(args.output)
        check_writable(args.output.parent)
        images = open_images(args.images, image_args)
        with state.local_main_process_first():  # weights may have to be downloaded
            extractor = build_extractor(extractor_args.extractor, extractor_args.extractor_weights, state.device)
        summary = summarize(
            images,
            extractor,
            statistics=[kind for kind in STATISTICS_KEYS if kind in extractor.provides],
            num_features=args.num_features,
            feature_folder=args.output.parent,
            num_workers=extractor_args.dataloader_num_workers,
        )
        if state.is_main_process:
            save_summary(args.output, summary)
            print(f"Statistics of {len(images)} images written to {args.output}.")
