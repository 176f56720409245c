"""Averages of the weights that nobody asked for while training: from snapshots of others (Karras et al. 2024)."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..files import write_atomically
from .power_profile import combination, gamma_of

SNAPSHOT_FOLDER = "ema_snapshots"
#: Distance of the profiles, relative to the wanted one's norm, from which it is another average.
MAX_PROFILE_ERROR = 0.1
_NAME = re.compile(r"step-(\d+)-(\d*\.?\d+)\.safetensors")


class Snapshot(NamedTuple):
    """A stored average: when, how wide, and the file."""

    step: int
    sigma_rel: float
    path: Path


class Reconstruction(NamedTuple):
    """Weights of an average, what it was made of, and how far its profile is from the one wanted, relative to it."""

    weights: dict[str, torch.Tensor]
    snapshots: list[Snapshot]
    profile_error: float


def save_snapshot(output_dir: Path, step: int, sigma_rel: float, weights: dict[str, torch.Tensor]) -> None:
    """Stores an average in the run's folder, in full precision: combining many magnifies rounding errors."""
    path = output_dir / SNAPSHOT_FOLDER / f"step-{step:07d}-{sigma_rel:g}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: save_file(weights, partial))


def drop_snapshots_after(output_dir: Path, step: int) -> None:
    """Removes snapshots of steps that are about to be done again, perhaps otherwise."""
    for snapshot in list_snapshots(output_dir):
        if snapshot.step > step:
            snapshot.path.unlink()


def list_snapshots(output_dir: Path) -> list[Snapshot]:
    """The snapshots of a run, by step and width."""
    found = [(_NAME.fullmatch(path.name), path) for path in (output_dir / SNAPSHOT_FOLDER).glob("*.safetensors")]
    return sorted(Snapshot(int(match[1]), float(match[2]), path) for match, path in found if match)


def reconstruct(output_dir: Path, sigma_rel: float, step: int | None = None, progress: bool = True) -> Reconstruction:
    """The average of a width as it would be had the run kept it.

    Args:
        output_dir: The run's folder.
        sigma_rel: The width, as a part of the training up to `step`.
        step: Where the average ends, by default at the last snapshot.
        progress: Whether to show a progress bar over the snapshots.

    Raises:
        ValueError: If there are no snapshots, none at `step`, one is damaged, `sigma_rel` is out of range, or the
            snapshots cannot make up such an average.
    """
    gamma = gamma_of(sigma_rel)
    snapshots = list_snapshots(output_dir)
    if not snapshots:
        raise ValueError(
            f"{output_dir / SNAPSHOT_FOLDER} holds no snapshots: train with --ema_profile power and "
            "--ema_snapshot_steps."
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
        [gamma_of(snapshot.sigma_rel) for snapshot in snapshots],
        step,
        gamma,
    )
    if error > MAX_PROFILE_ERROR:
        raise ValueError(
            f"{len(snapshots)} snapshots come no nearer to sigma_rel {sigma_rel:g} than {error:.0%} of its profile: "
            "ask for one nearer to theirs, or train with a smaller --ema_snapshot_steps."
        )
    pairs = zip(coefficients.tolist(), snapshots, strict=True)
    weights = _weighted_sum(tqdm(list(pairs), desc="Combining", unit="snapshot", disable=not progress))
    return Reconstruction(weights, snapshots, error)


def _weighted_sum(pairs: Iterable[tuple[float, Snapshot]]) -> dict[str, torch.Tensor]:
    """In double precision, a snapshot at a time; counts of batches and the like are the last snapshot's."""
    total, dtypes = {}, {}
    for coefficient, snapshot in pairs:
        try:
            with safe_open(snapshot.path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
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
