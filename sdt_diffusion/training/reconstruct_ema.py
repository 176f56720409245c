"""Make a pipeline whose weights are averaged over another width than the run kept, from the run's snapshots.

accelerate launch train/train_dit.py --ema_profile power --ema_snapshot_steps 50 --output_dir outputs/power
python train/reconstruct_ema.py --run outputs/power --sigma_rel 0.15 --output_dir outputs/power-0.15

A width is given as a fraction of the training, as in EDM2's paper.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

import sdt_diffusion  # noqa: F401  (registers the pipeline's classes with diffusers)

from ..hub import HubArguments, command_of, derive_record, share_run
from ..hub.run_record import RECORD_FILE
from ..utils.arguments import exit_on_error, given_arguments, parse_arguments
from ..utils.files import check_writable, move_into, write_atomically
from .ema import combination, power_exponent

SNAPSHOT_FOLDER = "ema_snapshots"
#: Largest distance between the fitted and the wanted profile, relative to the norm of the wanted one.
MAX_PROFILE_ERROR = 0.1
_NAME = re.compile(r"step-(\d+)-(\d*\.?\d+)\.safetensors")


class Snapshot(NamedTuple):
    """Stored average: its step, its width and its file."""

    step: int
    sigma_rel: float
    path: Path


class Reconstruction(NamedTuple):
    """Reconstructed weights, the snapshots they come from, and the relative distance between the profiles."""

    weights: dict[str, torch.Tensor]
    snapshots: list[Snapshot]
    profile_error: float


def save_snapshot(output_dir: Path, step: int, sigma_rel: float, weights: dict[str, torch.Tensor]) -> None:
    """Store an average in the run's folder, in full precision, since combining many magnifies rounding errors."""
    path = output_dir / SNAPSHOT_FOLDER / f"step-{step:07d}-{sigma_rel:g}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: save_file(weights, partial))


def drop_snapshots_after(output_dir: Path, step: int) -> None:
    """Remove the snapshots of steps that a resumed run makes again."""
    for snapshot in list_snapshots(output_dir):
        if snapshot.step > step:
            snapshot.path.unlink()


def list_snapshots(output_dir: Path) -> list[Snapshot]:
    """List the snapshots of a run, by step and width."""
    found = [(_NAME.fullmatch(path.name), path) for path in (output_dir / SNAPSHOT_FOLDER).glob("*.safetensors")]
    return sorted(Snapshot(int(match[1]), float(match[2]), path) for match, path in found if match)


def reconstruct(output_dir: Path, sigma_rel: float, step: int | None = None, progress: bool = True) -> Reconstruction:
    """Reconstruct the average of any width from the snapshots of a run.

    Args:
        output_dir: The run's folder.
        sigma_rel: The width, as a fraction of the training up to `step`.
        step: Step at which the average ends; that of the last snapshot by default.
        progress: Whether to show a progress bar over the snapshots.

    Raises:
        ValueError: If there are no snapshots, none at `step`, one is damaged, `sigma_rel` is out of range, or the
            snapshots cannot be combined into such an average.
    """
    gamma = power_exponent(sigma_rel)
    snapshots = list_snapshots(output_dir)
    if not snapshots:
        raise ValueError(
            f"{output_dir / SNAPSHOT_FOLDER} holds no snapshots: train with ema_profile power and ema_snapshot_steps."
        )
    steps = sorted({snapshot.step for snapshot in snapshots})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(
            f"There is no snapshot of step {step} in {output_dir}; there are {', '.join(map(str, steps))}."
        )
    snapshots = [snapshot for snapshot in snapshots if snapshot.step <= step]
    coefficients, error = combination(
        [snapshot.step for snapshot in snapshots],
        [power_exponent(snapshot.sigma_rel) for snapshot in snapshots],
        step,
        gamma,
    )
    if error > MAX_PROFILE_ERROR:
        raise ValueError(
            f"{len(snapshots)} snapshots reproduce the profile of sigma_rel {sigma_rel:g} with an error of "
            f"{error:.0%}: ask for a width nearer to theirs, or train with a smaller ema_snapshot_steps."
        )
    pairs = zip(coefficients.tolist(), snapshots, strict=True)
    weights = _weighted_sum(tqdm(list(pairs), desc="Combining", unit="snapshot", disable=not progress))
    return Reconstruction(weights, snapshots, error)


def _weighted_sum(pairs: Iterable[tuple[float, Snapshot]]) -> dict[str, torch.Tensor]:
    """Sum in double precision, one snapshot at a time; integer tensors are those of the last snapshot."""
    total, dtypes = {}, {}
    for coefficient, snapshot in pairs:
        try:
            with safe_open(snapshot.path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    tensor = file.get_tensor(name)
                    dtypes[name] = tensor.dtype
                    if tensor.is_floating_point():
                        previous = total.get(name, torch.zeros((), dtype=torch.float64))
                        total[name] = previous + coefficient * tensor.double()
                    else:
                        total[name] = tensor
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The snapshot {snapshot.path} is damaged ({error}); remove it and try again.") from error
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}


@dataclass
class ReconstructionArguments:
    """Which average to make."""

    run: Path = field(metadata={"help": "Folder of a finished run with snapshots."})
    sigma_rel: float = field(metadata={"help": "Width of the average, as a fraction of the training up to its end."})
    output_dir: Path = field(metadata={"help": "New or empty folder for the pipeline."})
    step: int | None = field(
        default=None, metadata={"help": "Step at which the average ends; the last snapshot by default."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse_arguments((ReconstructionArguments,), argv, description=__doc__)
    with exit_on_error(ValueError, OSError):
        if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
            raise ValueError(f"output_dir {args.output_dir} is not an empty folder: choose another.")
        if not (args.run / "model_index.json").is_file():
            raise ValueError(f"run {args.run} holds no pipeline: wait until the run has ended.")
        average = reconstruct(args.run, args.sigma_rel, args.step)
        check_writable(args.output_dir)
    pipe = DiffusionPipeline.from_pretrained(args.run)
    pipe.transformer.load_state_dict(average.weights)
    move_into(args.output_dir, pipe.save_pretrained)
    if (args.run / RECORD_FILE).is_file():
        changes = {
            "command": command_of("train/reconstruct_ema.py", given_arguments([ReconstructionArguments], argv)),
            "steps": max(snapshot.step for snapshot in average.snapshots),
            "sigma_rel": args.sigma_rel,
            "snapshots": len(average.snapshots),
        }
        networks = [network for network in (pipe.transformer, pipe.vae) if network is not None]
        with exit_on_error(ValueError, OSError):
            share_run(HubArguments(), args.output_dir, derive_record(args.run, networks, changes))
    print(
        f"Saved the pipeline of sigma_rel {args.sigma_rel:g} at step {max(s.step for s in average.snapshots)} to "
        f"{args.output_dir}, from {len(average.snapshots)} snapshots; their profiles differ from its own by "
        f"{average.profile_error:.2%}."
    )


if __name__ == "__main__":
    main()
