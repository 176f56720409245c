"""Top-1 and top-5 accuracy of an image classifier, class by class, with its throughput and cost.

    python eval/accuracy.py --model outputs/sdt-h --dataset data/val --output outputs/sdt-h/accuracy.json

Any model of transformers' AutoModelForImageClassification, this project's among them, on a folder (a subfolder a
class), a parquet file or a data set of the Hub, prepared by the model's own image processor. Classes and labels are
matched by name where both have names, else by index. Prints a table, and writes the numbers, class by class, with all
that made them to --output and a picture of the confusion beside it. `accelerate launch eval/accuracy.py` shares the
work among processes.
"""

import sys

import torch
from accelerate import PartialState

from sdt_diffusion.command_line import errors_in_a_line, parse_arguments
from sdt_diffusion.evaluation.accuracy import evaluate_accuracy
from sdt_diffusion.evaluation.arguments import AccuracyArguments


def main(argv):
    (args,) = parse_arguments((AccuracyArguments,), argv, description=__doc__)
    PartialState(cpu=not torch.cuda.is_available())
    with errors_in_a_line(ValueError, OSError):
        table = evaluate_accuracy(args)
    if table is not None:
        print(f"\n{table}\n\nWritten to {args.output}.")


if __name__ == "__main__":
    main(sys.argv[1:])
