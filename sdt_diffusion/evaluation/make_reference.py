"""Save the statistics of a reference, so that its images need not be read again for every evaluation.

    python eval/make_reference.py --images digits --extractor pixels --output outputs/digits-pixels.safetensors

The file holds means and covariances under the names of ADM's tools (mu, sigma, mu_s, sigma_s), features of some images
for precision, recall and KID, and a record of how all this was computed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from ..data.raw_images import RawImageArguments, RawImages, open_images
from ..metrics.extraction import measure_dims, summarize
from ..metrics.extractors import ExtractorArguments, FeatureExtractor
from ..metrics.features import MAX_FEATURES, STATISTICS_KEYS, check_summary_path, save_summary
from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import check_writable, require_space
from ..utils.ranges import CheckedArguments, between


@dataclass
class ReferenceArguments(CheckedArguments):
    """Which images to summarize, and where to write the statistics."""

    images: str = field(metadata={"help": "Folder of images, data set (file, Hub name or 'digits'), or .npz."})
    output: Path = field(metadata={"help": ".safetensors or .npz file."})
    num_features: int = field(
        default=10_000,
        metadata={"help": "Images, at random, whose features to keep; 0 for none."} | between(0, MAX_FEATURES),
    )


def save_reference(
    path: Path, images: RawImages, extractor: FeatureExtractor, num_features: int, num_workers: int = 0
) -> None:
    """Write the statistics of images, and features of some, to a file. Called by all processes.

    Args:
        path: `.safetensors` or `.npz`; its folder exists.
        images: The images.
        extractor: Computes the features.
        num_features: Images, at random, whose features to keep.
        num_workers: Processes that read images.

    Raises:
        OSError: If the disk cannot hold them.
        ValueError: If an image cannot be used.
    """
    num_values = min(num_features, len(images)) * measure_dims(extractor, images[0].shape)["pool"]
    require_space(path.parent, 2 * 4 * num_values, "The features, while they are written,")
    summary = summarize(
        images,
        extractor,
        statistics=[kind for kind in STATISTICS_KEYS if kind in extractor.provides],
        num_features=num_features,
        feature_folder=path.parent,
        num_workers=num_workers,
        desc="Reference",
    )
    if summary is not None:  # on the main process
        save_summary(path, summary)


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    types = (ReferenceArguments, ExtractorArguments, RawImageArguments)
    args, extractor_args, image_args = parse_arguments(types, argv, description=__doc__)
    state = PartialState(cpu=not torch.cuda.is_available())
    check_summary_path(args.output)
    check_writable(args.output.parent)
    images = open_images(args.images, image_args)
    with state.local_main_process_first():  # one process downloads the weights
        extractor = extractor_args.build(state.device)
    save_reference(args.output, images, extractor, args.num_features, extractor_args.dataloader_num_workers)
    if state.is_main_process:
        print(f"Statistics of {len(images)} images written to {args.output}.")


if __name__ == "__main__":
    main()
