"""Makes the pipeline of another average of the weights than the run kept, from the snapshots it stored.

accelerate launch train/train_dit.py --ema_profile power --ema_snapshot_steps 50 --output_dir outputs/power
python train/reconstruct_ema.py --run outputs/power --sigma_rel 0.15 --output_dir outputs/power-0.15
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

import sdt_diffusion  # noqa: F401  (lets diffusers find the pipeline's classes)

from ..utils.arguments import errors_in_a_line, parse_arguments
from ..utils.files import check_writable, move_into, write_atomically
from .distributed import local


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile whose standard deviation, as a part of the training so far, is `sigma_rel`.

    Raises:
        ValueError: If it is not between 0.001 and 1 / sqrt(12), the width of a plain mean.
    """
    if not 0.001 <= sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel must lie between 0.001 and {12**-0.5:.3f}, not {sigma_rel}.")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def inner_products(
    steps: Sequence[float], gammas: Sequence[float], other_steps: Sequence[float], other_gammas: Sequence[float]
) -> np.ndarray:
    """Integrals of products of two profiles, shape (first, second).

    With u the earlier of their times t and t', and everything in units of it:
    (gamma + 1) (gamma' + 1) / (gamma + gamma' + 1) * (u/t)^(gamma + 1) (u/t')^(gamma' + 1) / u.
    """
    t, g = np.asarray(steps, float)[:, None], np.asarray(gammas, float)[:, None]
    t2, g2 = np.asarray(other_steps, float)[None], np.asarray(other_gammas, float)[None]
    u = np.minimum(t, t2)
    shares = (u / t) ** (g + 1) * (u / t2) ** (g2 + 1)
    return (g + 1) * (g2 + 1) / (g + g2 + 1) * shares / u


def combination(
    steps: Sequence[float], gammas: Sequence[float], wanted_step: float, wanted_gamma: float
) -> tuple[np.ndarray, float]:
    """How to combine averages into another: the least squares fit of its profile by theirs.

    Args:
        steps: When the averages were stored.
        gammas: Exponents of their profiles.
        wanted_step: Where the other average ends.
        wanted_gamma: Exponent of its profile.

    Returns:
        A coefficient for each average, and the distance of the fit from the wanted profile, relative to its norm.
    """
    scale = wanted_step  # of order one, so that the solver's threshold for rank means the same in any run
    steps = np.asarray(steps, float) / scale
    gram = inner_products(steps, gammas, steps, gammas)
    target = inner_products(steps, gammas, [1.0], [wanted_gamma])[:, 0]
    coefficients = np.linalg.lstsq(gram, target, rcond=1e-14)[0]
    norm = inner_products([1.0], [wanted_gamma], [1.0], [wanted_gamma])[0, 0]
    error = norm - 2 * coefficients @ target + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(error, 0.0) / norm))


#: Optimizer step, counted from 1, to the weight of the old average.
Profile = Callable[[int], float]


def constant_profile(decay: float) -> Profile:
    """DiT's: the same decay from the first step, beginning at the initial weights."""
    return lambda step: decay


def ramped_profile(decay: float) -> Profile:
    """diffusers': (1 + n) / (10 + n) after n steps, up to `decay`, beginning at the weights after the first step."""
    return lambda step: 0.0 if step == 1 else min(step / (9 + step), decay)


def power_profile(sigma_rel: float) -> Profile:
    """An average whose width is always the same part of the training so far (Karras et al. 2024, section 3.1).

    The old average's weight (1 - 1/t)^(gamma + 1) gives the weights of step t a share proportional to t^gamma.
    """
    gamma = gamma_of(sigma_rel)
    return lambda step: (1 - 1 / step) ** (gamma + 1)


def profiles(args: Any) -> dict[str, Profile]:
    """The averages that the arguments ask for, by the ending of their folders' names; the first is the product."""
    if not args.use_ema:
        return {}
    if args.ema_profile == "power":
        return {f"ema_{sigma_rel:g}": power_profile(sigma_rel) for sigma_rel in args.ema_sigma_rel}
    profile = constant_profile if args.ema_profile == "constant" else ramped_profile
    return {"ema": profile(args.ema_decay)}


class WeightAverage:
    """The average of a model's weights under one profile.

    Statistics of batch norms are averaged along, as timm does. Of a sharded model, each process averages its part.

    Args:
        sources: Names and tensors of the model, which optimizer steps change in place.
        profile: See `profiles`.
    """

    def __init__(self, sources: dict[str, torch.Tensor], profile: Profile):
        self.profile = profile
        self.tensors = {name: tensor.detach().clone() for name, tensor in sources.items()}
        pairs = [(local(self.tensors[name]), local(source.detach())) for name, source in sources.items()]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def step(self, step: int) -> None:
        """Averages in the weights after optimizer step `step`, counted from 1."""
        averages, sources = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, sources, 1 - self.profile(step))
        for copy, source in self._copied:
            copy.copy_(source)


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


@dataclass
class ReconstructionArguments:
    """Which average."""

    run: Path = field(metadata={"help": "Folder of a finished run with snapshots."})
    sigma_rel: float = field(metadata={"help": "Width of the average, as a part of the training up to its end."})
    output_dir: Path = field(metadata={"help": "New or empty folder for the pipeline."})
    step: int | None = field(default=None, metadata={"help": "Where the average ends; the last snapshot by default."})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
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
