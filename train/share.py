"""Writes the model card of a trained model anew, with the numbers found since, and pushes the model to the Hub.

python train/share.py --folder outputs/digits                                            # README.md only
python train/share.py --folder outputs/digits --push_to_hub --hub_model_id me/digits     # and push
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from sdt_diffusion.command_line import errors_in_a_line, parse_arguments
from sdt_diffusion.sharing import HubArguments, share_folder


@dataclass
class FolderArguments:
    """What to share."""

    folder: str = field(metadata={"help": "What train_dit.py or train_classifier.py made."})


def main(argv):
    args, hub_args = parse_arguments((FolderArguments, HubArguments), argv, description=__doc__)
    with errors_in_a_line(ValueError, RuntimeError):
        share_folder(hub_args, Path(args.folder))


if __name__ == "__main__":
    main(sys.argv[1:])
