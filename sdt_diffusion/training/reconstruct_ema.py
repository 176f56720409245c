"""Make a pipeline whose weights are averaged over another width than the run kept, from the run's snapshots.

accelerate launch train/train_dit.py --ema_profile power --ema_snapshot_steps 50 --output_dir outputs/power
python train/reconstruct_ema.py --run outputs/power --sigma_rel 0.15 --output_dir outputs/power-0.15

A width is given as a fraction of the training, as in EDM2's paper.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..hub import HubArguments, command_of, derive_record, share_run
from ..hub.run_record import RECORD_FILE
from ..sdt.loading import open_pipeline
from ..utils.arguments import exit_on_error, given_arguments, parse_arguments
from ..utils.files import check_writable, move_into, require_space, write_atomically
from ..utils.ranges import RANGE_KEY, CheckedArguments, at_least
from ..utils.reading import check_tensors, read_tensors
from .ema import SIGMA_REL, combination, power_exponent

SNAPSHOT_FOLDER = "ema_snapshots"
#: Largest distance between the fitted and the wanted profile, relative to the norm of the wanted one.
MAX_PROFILE_ERROR = 0.1
#: Key of a snapshot's metadata: the digest of its tensors.
DIGEST_KEY = "sha256"
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
    """Store an average in the run's folder, in full precision, since combining many magnifies rounding errors.

    Its tensors' digest lies within the file, so that both are written, moved and copied at once.
    """
    path = output_dir / SNAPSHOT_FOLDER / f"step-{step:07d}-{sigma_rel:g}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = _digest(weights)
    write_atomically(path, lambda partial: save_file(weights, partial, {DIGEST_KEY: digest}))


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 of the names, types, shapes and values of tensors, which are hashed side by side."""

    def digest(name: str) -> bytes:
        tensor = tensors[name].detach().cpu().contiguous()
        values = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return values.digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, sorted(tensors)))).hexdigest()


def _read_snapshot(path: Path) -> dict[str, torch.Tensor]:
    """Read a snapshot, and compare it with its digest; those of earlier versions have none.

    Raises:
        ValueError: If it is damaged; names it.
    """
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        digest = (file.metadata() or {}).get(DIGEST_KEY)
    if digest is not None and digest != _digest(tensors):
        raise ValueError(f"{path} is damaged: its tensors changed since they were written.")
    return tensors


def drop_snapshots_after(output_dir: Path, step: int) -> None:
    """Remove the snapshots of steps that a resumed run makes again."""
    for snapshot in list_snapshots(output_dir):
        if snapshot.step > step:
            snapshot.path.unlink()


def list_snapshots(output_dir: Path) -> list[Snapshot]:
    """List the snapshots of a run, by step and width."""
    found = [(_NAME.fullmatch(path.name), path) for path in (output_dir / SNAPSHOT_FOLDER).glob("*.safetensors")]
    return sorted(Snapshot(int(match[1]), float(match[2]), path) for match, path in found if match)


def reconstruct(
    output_dir: Path,
    sigma_rel: float,
    step: int | None = None,
    progress: bool = True,
    expected: Mapping[str, torch.Tensor] | None = None,
) -> Reconstruction:
    """Reconstruct the average of any width from the snapshots of a run.

    Args:
        output_dir: The run's folder.
        sigma_rel: The width, as a fraction of the training up to `step`.
        step: Step at which the average ends; that of the last snapshot by default.
        progress: Whether to show a progress bar over the snapshots.
        expected: Tensors of the names, shapes and types that each snapshot must have; those of the first by default.

    Raises:
        OSError: If a snapshot cannot be read.
        ValueError: If there are no snapshots, none at `step`, one is damaged, has other tensors or some that are not
            finite, `sigma_rel` is out of range, or the snapshots cannot be combined into such an average.
    """
    gamma = power_exponent(sigma_rel)
    snapshots = list_snapshots(output_dir)
    if not snapshots:
        raise ValueError(
            f"{output_dir / SNAPSHOT_FOLDER} holds no snapshots: train with ema_profile power and ema_snapshot_steps."
        )
    for snapshot in snapshots:
        if snapshot.step < 1 or not SIGMA_REL.has(snapshot.sigma_rel):
            raise ValueError(f"{snapshot.path} is named as no snapshot is: remove it and try again.")
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
    if not error <= MAX_PROFILE_ERROR:
        raise ValueError(
            f"{len(snapshots)} snapshots reproduce the profile of sigma_rel {sigma_rel:g} with an error of "
            f"{error:.0%}: ask for a width nearer to theirs, or train with a smaller ema_snapshot_steps."
        )
    pairs = zip(coefficients.tolist(), snapshots, strict=True)
    weights = _weighted_sum(tqdm(list(pairs), desc="Combining", unit="snapshot", disable=not progress), expected)
    return Reconstruction(weights, snapshots, error)


def _weighted_sum(
    pairs: Iterable[tuple[float, Snapshot]], expected: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Sum in double precision, one snapshot at a time; integer tensors are those of the last snapshot."""
    total: dict[str, torch.Tensor] = {}
    for coefficient, snapshot in pairs:
        try:
            tensors = _read_snapshot(snapshot.path)
            expected = tensors if expected is None else expected
            check_tensors(tensors, expected, str(snapshot.path))
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}. Remove it and try again.") from error
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                total[name] = total.get(name, 0) + coefficient * tensor.double()
            else:
                total[name] = tensor
    return {name: tensor.to((expected or {})[name].dtype) for name, tensor in total.items()}


@dataclass
class ReconstructionArguments(CheckedArguments):
    """Which average to make."""

    run: Path = field(metadata={"help": "Folder of a finished run with snapshots."})
    sigma_rel: float = field(
        metadata={"help": "Width of the average, as a fraction of the training up to its end.", RANGE_KEY: SIGMA_REL}
    )
    output_dir: Path = field(metadata={"help": "New or empty folder for the pipeline."})
    step: int | None = field(
        default=None, metadata={"help": "Step at which the average ends; the last snapshot by default."} | at_least(1)
    )


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse_arguments((ReconstructionArguments,), argv, description=__doc__)
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise ValueError(f"output_dir {args.output_dir} is not an empty folder: choose another.")
    if not (args.run / "model_index.json").is_file():
        raise ValueError(f"run {args.run} holds no pipeline: wait until the run has ended.")
    parents = (args.output_dir.absolute(), *args.output_dir.absolute().parents)
    check_writable(next(path for path in parents if path.exists()))  # without making the folder yet
    pipe = open_pipeline(str(args.run))
    size = sum(parameter.numel() * parameter.element_size() for parameter in pipe.transformer.parameters())
    require_space(args.output_dir, size, "The pipeline")
    average = reconstruct(args.run, args.sigma_rel, args.step, expected=pipe.transformer.state_dict())
    pipe.transformer.load_state_dict(average.weights)
    last_step = max(snapshot.step for snapshot in average.snapshots)
    changes = {
        "command": command_of("train/reconstruct_ema.py", given_arguments([ReconstructionArguments], argv)),
        "steps": last_step,
        "sigma_rel": args.sigma_rel,
        "snapshots": len(average.snapshots),
    }
    networks = [network for network in (pipe.transformer, pipe.vae) if network is not None]
    has_record = (args.run / RECORD_FILE).is_file()
    record = derive_record(args.run, networks, changes) if has_record else None
    check_writable(args.output_dir)
    move_into(args.output_dir, pipe.save_pretrained)
    if record is not None:
        share_run(HubArguments(), args.output_dir, record)
    print(
        f"Saved the pipeline of sigma_rel {args.sigma_rel:g} at step {last_step} to {args.output_dir}, from "
        f"{len(average.snapshots)} snapshots; their profiles differ from its own by {average.profile_error:.2%}."
    )


if __name__ == "__main__":
    main()
