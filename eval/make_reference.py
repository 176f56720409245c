"""Statistics of a reference, so that its images need not be read again for every evaluation.

    python eval/make_reference.py --images digits --extractor pixels --output outputs/digits-pixels.safetensors

The file holds means and covariances under the names of ADM's tools (mu, sigma, mu_s, sigma_s), features of some images
for precision, recall and KID, and the record of how they came about.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from sdt_diffusion.command_line import errors_in_a_line, parse_arguments, require_at_least
from sdt_diffusion.data.raw_images import RawImageArguments, open_images
from sdt_diffusion.evaluation.arguments import ExtractorArguments
from sdt_diffusion.files import check_writable
from sdt_diffusion.metrics.extraction import summarise
from sdt_diffusion.metrics.extractors import build_extractor
from sdt_diffusion.metrics.summary import STATISTICS_KEYS, check_summary_path, save_summary


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


def main(argv):
    types = (ReferenceArguments, ExtractorArguments, RawImageArguments)
    args, extractor_args, image_args = parse_arguments(types, argv, description=__doc__)
    state = PartialState(cpu=not torch.cuda.is_available())
    with errors_in_a_line(ValueError, OSError):
        check_summary_path(args.output)
        check_writable(args.output.parent)
        images = open_images(args.images, image_args, "--images")
        with state.local_main_process_first():  # weights may have to be downloaded
            extractor = build_extractor(extractor_args.extractor, extractor_args.extractor_weights, state.device)
        summary = summarise(
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


if __name__ == "__main__":
    main(sys.argv[1:])
