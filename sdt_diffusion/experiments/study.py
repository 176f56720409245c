"""Read the YAML file of a study: data, arguments, variants, seeds and evaluation."""

import contextlib
import difflib
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..attention.dispatch import MAX_PRUNE_EPS
from ..data.decoding import RESOLUTIONS
from ..training import train_classifier, train_dit
from ..utils.arguments import JSON_FIELD_ENDING, parse_arguments
from ..utils.ranges import CheckedArguments, a_seed, between, check_value
from ..utils.reading import read_yaml

#: Trainer -> its module, which has `main` and `ARGUMENT_TYPES`.
TRAINERS: dict[str, Any] = {"train_dit": train_dit, "train_classifier": train_classifier}
#: Arguments of trainers that the runner sets itself.
SET_BY_RUNNER = ("seed", "output_dir", "resume_from_checkpoint", "push_to_hub")
#: Keys of a study's file, besides `extends`.
KEYS = ("title", "trainer", "baseline", "also_compare", "seeds", "arguments", "variants", "cumulative", "evaluation")
#: Names of variants are names of files.
NAME = re.compile(r"\+?[a-z0-9][a-z0-9_.-]*")
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Evaluation(CheckedArguments):
    """How a trained model is judged, besides what its trainer measures.

    Args:
        reference: Images to compare samples with: a data set's name or file, or a folder; `None` for no samples.
        extractor: See `eval/fid.py`; the samples' accuracy is measured if it is a classifier.
        samples: Number of samples, of the classes in turn.
        num_inference_steps: Steps of the sampler, without guidance.
        batch_size: Samples, or images of a classifier, at a time.
        resolutions: Sides of images, in pixels, other than the trained one to measure the model on too.
        scaling_images: Images that choose the scaling of positions and distances there; see `other_grids`.
        gate_images: Held-out images on which the gates are described at the end; see `locality`.
        attention_images: Held-out images on which the reach of attention is measured at all resolutions; see `reach`.
        prune_eps: Shares of each query's softmax that attention may skip, to measure what pruning saves.
        pruning_images: Held-out images that it is measured on.
    """

    reference: str | None = None
    extractor: str = "pixels"
    samples: int = field(default=2000, metadata=between(2, 1_000_000))
    num_inference_steps: int = field(default=25, metadata=between(1, 1000))
    batch_size: int = field(default=64, metadata=between(1, 10_000))
    resolutions: list[int] = field(default_factory=list, metadata=RESOLUTIONS)
    scaling_images: int = field(default=128, metadata=between(1, 1_000_000))
    gate_images: int = field(default=0, metadata=between(0, 1_000_000))
    attention_images: int = field(default=0, metadata=between(0, 1_000_000))
    prune_eps: list[float] = field(default_factory=list, metadata=between(0, MAX_PRUNE_EPS, with_least=False))
    pruning_images: int = field(default=64, metadata=between(1, 1_000_000))


#: Keys of an evaluation that a classifier's study may have.
OF_CLASSIFIERS = ("batch_size", "resolutions", "scaling_images")


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Args:
        study: Name of the study.
        variant: Name of the variant.
        seed: Seed of the run.
        trainer: A key of `TRAINERS`.
        arguments: Arguments of the trainer as the study gives them, without the seed.
        evaluation: How it is judged.
    """

    study: str
    variant: str
    seed: int
    trainer: str
    arguments: Mapping[str, Any]
    evaluation: Evaluation

    @property
    def name(self) -> str:
        """Name of its results file, without ending."""
        return f"{self.variant}-seed{self.seed}"

    @property
    def config(self) -> dict[str, Any]:
        """All that its results depend on besides code and data, as results files hold it."""
        return {"trainer": self.trainer, "arguments": dict(self.arguments), "evaluation": asdict(self.evaluation)}

    @property
    def folder_name(self) -> str:
        """Name of the folder to work in: cells of other arguments have others."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:8]}"

    def filled(self, folders: Mapping[str, str]) -> tuple[list[str], Evaluation]:
        """Return the trainer's command line and the evaluation, with folders of this machine for placeholders.

        Args:
            folders: Placeholder -> folder; `{seed}` is the cell's own.

        Raises:
            ValueError: If a placeholder is not known; names it.
        """
        values = {**folders, "seed": str(self.seed)}
        argv = [word for name, value in self.arguments.items() for word in flag(name, fill(value, values))]
        evaluation = Evaluation(**fill(asdict(self.evaluation), values))
        return [*argv, f"--seed={self.seed}"], evaluation


@dataclass(frozen=True)
class Study:
    """A comparison of variants of a run.

    Args:
        name: Stem of its file.
        title: What is compared, for tables.
        trainer: A key of `TRAINERS`.
        arguments: Arguments of all variants.
        variants: Name -> arguments over those, in the order of tables.
        baseline: The variant that others are compared with.
        also_compare: Further variants that others are compared with.
        seeds: Seeds of each variant.
        evaluation: How runs are judged.
    """

    name: str
    title: str
    trainer: str
    arguments: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    baseline: str
    also_compare: Sequence[str]
    seeds: Sequence[int]
    evaluation: Evaluation

    def cells(self) -> list[Cell]:
        """Return all cells: every variant with the first seed, then with the next one."""
        return [self.cell(variant, seed) for seed in self.seeds for variant in self.variants]

    def cell(self, variant: str, seed: int) -> Cell:
        """Return one cell."""
        arguments = merge(self.arguments, self.variants[variant])
        return Cell(self.name, variant, seed, self.trainer, arguments, self.evaluation)

    @property
    def placeholders(self) -> list[str]:
        """Names of the folders that the study needs, in order."""
        text = json.dumps([self.arguments, self.variants, asdict(self.evaluation)], default=dict)
        return [name for name in dict.fromkeys(PLACEHOLDER.findall(text)) if name != "seed"]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`; JSON objects, such as `model_overrides`, are merged key by key."""
    merged = {**base, **over}
    for name, value in over.items():
        if name.endswith(JSON_FIELD_ENDING) and isinstance(value, dict) and isinstance(base.get(name), dict):
            merged[name] = {**base[name], **value}
    return merged


def flag(name: str, value: Any) -> list[str]:
    """Return the words of a command line that set an argument; none for `None`, which stands for its default."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def fill(value: Any, folders: Mapping[str, str]) -> Any:
    """Return a value with `{data}` and the like replaced in its texts.

    Raises:
        ValueError: If a placeholder is not known; names it.
    """
    if isinstance(value, dict):
        return {key: fill(item, folders) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, folders) for item in value]
    if not isinstance(value, str):
        return value
    for name in PLACEHOLDER.findall(value):
        if name not in folders:
            known = ", ".join(sorted({*folders, "data", "extractor", "pretrained"}))
            raise ValueError(f"{value!r} needs a folder for {{{name}}}; known placeholders are {known}.")
    return PLACEHOLDER.sub(lambda match: folders[match[1]], value)


def read_study(path: Path) -> Study:
    """Read the file of a study.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds no study; names the file, the key and the value.
    """
    values = read_yaml(path)
    try:
        return _study_of(path.stem, _extended(path, values))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _extended(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values over those of the study that they extend, if any; arguments are merged."""
    values = dict(values)
    other = values.pop("extends", None)
    if other is None:
        return values
    if not isinstance(other, str) or not NAME.fullmatch(other):
        raise ValueError(f"extends must be the name of a study in the same folder, not {other!r}.")
    base = read_yaml(path.with_name(f"{other}.yaml"))
    if "extends" in base:
        raise ValueError(f"extends: {other} extends a study itself: name that one.")
    arguments = merge(_mapping("arguments", base.get("arguments")), _mapping("arguments", values.get("arguments")))
    return {**base, **values, "arguments": arguments}


def _study_of(name: str, values: dict[str, Any]) -> Study:
    refuse_unknown("key", values, KEYS)
    missing = [key for key in ("title", "trainer", "seeds", "variants") if key not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing.")
    if values["trainer"] not in TRAINERS:
        raise ValueError(f"trainer must be {' or '.join(TRAINERS)}, not {values['trainer']!r}.")
    given = {key: _mapping(key, values.get(key)) for key in ("arguments", "variants", "evaluation")}
    variants = {variant: _mapping(f"variants: {variant}", over) for variant, over in given["variants"].items()}
    if not variants:
        raise ValueError("variants must name at least one.")
    variants |= _added_in_order(variants, values.get("cumulative", []))
    for variant in variants:
        if not NAME.fullmatch(variant):
            raise ValueError(f"variants: {variant!r} is no name: use lower-case letters, digits, _, - and a dot.")
    seeds = values["seeds"]
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise ValueError(f"seeds must be a list of different numbers, not {seeds!r}.")
    for seed in seeds:
        check_value("seeds", seed, (int,), a_seed()["range"])
    baseline = values.get("baseline", next(iter(variants)))
    if baseline not in variants:
        raise ValueError(f"baseline must be one of the variants, not {baseline!r}.")
    also_compare = values.get("also_compare", [])
    if not isinstance(also_compare, list) or any(name not in variants or name == baseline for name in also_compare):
        raise ValueError(f"also_compare must be a list of variants other than the baseline, not {also_compare!r}.")
    refuse_unknown("evaluation", given["evaluation"], [each.name for each in fields(Evaluation)])
    of_samples = [name for name in given["evaluation"] if name not in OF_CLASSIFIERS]
    if of_samples and values["trainer"] != "train_dit":
        raise ValueError(f"evaluation: {of_samples[0]} is for samples of train_dit; a classifier's trainer tests it.")
    evaluation = Evaluation(**given["evaluation"])
    study = Study(
        name=name,
        title=str(values["title"]),
        trainer=values["trainer"],
        arguments=given["arguments"],
        variants=variants,
        baseline=baseline,
        also_compare=also_compare,
        seeds=seeds,
        evaluation=evaluation,
    )
    for variant in variants:
        _check_arguments(study.cell(variant, seeds[0]))
    return study


def _added_in_order(variants: dict[str, dict[str, Any]], order: Any) -> dict[str, dict[str, Any]]:
    """Return a variant "+name" for each name, with the arguments of all up to it.

    One that equals a variant that exists already, as the first one does, is left out.
    """
    if not isinstance(order, list) or any(name not in variants for name in order) or len({*order}) < len(order):
        raise ValueError(f"cumulative must be a list of different variants, not {order!r}.")
    added: dict[str, dict[str, Any]] = {}
    so_far: dict[str, Any] = {}
    for name in order:
        so_far = merge(so_far, variants[name])
        if so_far not in variants.values():
            added[f"+{name}"] = so_far
    return added


def _check_arguments(cell: Cell) -> None:
    """Refuse arguments that the trainer does not know, before a cell is trained."""
    if cell.trainer == "train_dit":
        zero = [name for name in ("held_out_images", "velocity_error_images") if not cell.arguments.get(name)]
        if zero:
            raise ValueError(f"variant {cell.variant} measures no velocity error: set {' and '.join(zero)}.")
    own = [name for name in SET_BY_RUNNER if name in cell.arguments]
    if own:
        raise ValueError(f"variant {cell.variant}: {', '.join(own)} is set by the runner.")
    anywhere = {name: name for name in PLACEHOLDER.findall(json.dumps(cell.config))}
    argv, _ = cell.filled(anywhere)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_arguments(TRAINERS[cell.trainer].ARGUMENT_TYPES, argv)
    except SystemExit as error:
        reason = said.getvalue().partition("error: ")[2].strip() or error.code
        raise ValueError(f"variant {cell.variant}: {reason}") from error


def refuse_unknown(what: str, names: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse names that are not known, and suggest a similar one."""
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"known are {', '.join(known)}."
            raise ValueError(f"unknown {what} {name!r}: {hint}")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a mapping of names to values, not {value!r:.60}.")
    return value
