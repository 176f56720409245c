"""What a network's learned decay lets it look at: a picture for chosen patches, head by head.

    python eval/decay_maps.py --model outputs/sdt-h --image cat.jpg --output outputs/sdt-h/decay.png
    python eval/decay_maps.py --model outputs/digits --timestep 900 500 100 --class_label 3 --output decay.png

A classifier is shown an image, a generator a sample of its own, noised to each timestep. A row is a patch, marked, and
a map a head. The colour is exp(M), the factor by which the decay multiplies attention to each patch before it is
normalised; beneath stands at how many patches' distance it has fallen to a half. Where attention is decomposed into
rows and columns, it is the product of both passes. --attention adds the attention that comes of it.
"""

import sys

import torch

import sdt_diffusion  # noqa: F401  (lets diffusers find the pipeline's classes)
from sdt_diffusion.command_line import errors_in_a_line, parse_arguments
from sdt_diffusion.evaluation.arguments import DecayArguments
from sdt_diffusion.evaluation.decay_picture import draw_decays


def main(argv):
    (args,) = parse_arguments((DecayArguments,), argv, description=__doc__)
    with errors_in_a_line(ValueError, OSError):
        draw_decays(args, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"Written to {args.output}.")


if __name__ == "__main__":
    main(sys.argv[1:])
