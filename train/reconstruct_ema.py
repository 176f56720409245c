"""Makes the pipeline of another average of the weights than the run kept, from the snapshots it stored.

accelerate launch train/train_dit.py --ema_profile power --ema_snapshot_steps 50 --output_dir outputs/power
python train/reconstruct_ema.py --run outputs/power --sigma_rel 0.15 --output_dir outputs/power-0.15
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import DiffusionPipeline

import sdt_diffusion  # noqa: F401  (lets diffusers find the pipeline's classes)
from sdt_diffusion.command_line import errors_in_a_line, parse_arguments
from sdt_diffusion.files import check_writable, move_into
from sdt_diffusion.training.post_hoc import reconstruct


@dataclass
class ReconstructionArguments:
    """Which average."""

    run: Path = field(metadata={"help": "Folder of a finished run with snapshots."})
    sigma_rel: float = field(metadata={"help": "Width of the average, as a part of the training up to its end."})
    output_dir: Path = field(metadata={"help": "New or empty folder for the pipeline."})
    step: int | None = field(default=None, metadata={"help": "Where the average ends; the last snapshot by default."})


def main(argv):
    (args,) = parse_arguments((ReconstructionArguments,), argv, description=__doc__)
    with errors_in_a_line(ValueError, OSError):
        if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
            raise ValueError(f"--output_dir {args.output_dir} is not an empty folder: choose another.")
        if not (args.run / "model_index.json").is_file():
            raise ValueError(f"--run {args.run} holds no pipeline: the run must have ended.")
        average = reconstruct(args.run, args.sigma_rel, args.step)
        check_writable(args.output_dir)
    pipe = DiffusionPipeline.from_pretrained(args.run)
    pipe.transformer.load_state_dict(average.weights)
    move_into(args.output_dir, pipe.save_pretrained)
    print(
        f"Saved the pipeline of sigma_rel {args.sigma_rel:g} at step {max(s.step for s in average.snapshots)} to "
        f"{args.output_dir}, from {len(average.snapshots)} snapshots; their profiles differ from its own by "
        f"{average.profile_error:.2%}."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
