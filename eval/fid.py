"""FID, sFID, Inception Score, precision, recall and KID of samples against a reference.

    python eval/fid.py --model outputs/digits --num_samples 1797 --num_inference_steps 25 \\
        --reference digits --extractor pixels --output outputs/digits/fid.json

Prints a table and writes the numbers with all that made them to --output, some samples and some of the reference's
images to a picture beside it, and with --model the samples to a folder beside it. A run that is interrupted goes on
where it stopped when the same command is given again. `accelerate launch eval/fid.py` shares the work among processes.
"""

import sys

import torch
from accelerate import PartialState

import sdt_diffusion  # noqa: F401  (lets diffusers find the pipeline's classes)
from sdt_diffusion.command_line import errors_in_a_line, parse_arguments
from sdt_diffusion.data.raw_images import RawImageArguments
from sdt_diffusion.evaluation.arguments import ExtractorArguments, FidArguments, SamplingArguments
from sdt_diffusion.evaluation.compare import compare
from sdt_diffusion.metrics.extractors import build_extractor


def main(argv):
    types = (FidArguments, SamplingArguments, ExtractorArguments, RawImageArguments)
    args, sampling_args, extractor_args, image_args = parse_arguments(types, argv, description=__doc__)
    state = PartialState(cpu=not torch.cuda.is_available())
    with errors_in_a_line(ValueError, OSError):
        with state.local_main_process_first():  # weights may have to be downloaded
            extractor = build_extractor(extractor_args.extractor, extractor_args.extractor_weights, state.device)
        table = compare(args, sampling_args, extractor, image_args, extractor_args.dataloader_num_workers)
    if table is not None:
        print(f"\n{table}\n\nWritten to {args.output}.")


if __name__ == "__main__":
    main(sys.argv[1:])
