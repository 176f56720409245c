r"""Compute FID and the other metrics over guidance, steps, schedulers and averages of weights, and find the best.

    python eval/sweep.py --model outputs/digits --num_samples 1797 --reference digits --extractor pixels \
        --axes guidance_scale=1,1.5,2,3 num_inference_steps=5,10,25 guidance=cfg,decay --output_dir outputs/sweep

An axis is any flag of sampling with several values: guidance, guidance_scale, guidance_interval=none,0.2:0.8,
scheduler, num_inference_steps, model=FOLDER,FOLDER (averages that train/reconstruct_ema.py made), seed, and so on. All
combinations are cells, which start from the same noise. `--search guidance_scale 1 4` looks for the best value of one
number instead, at its ends and by golden sections between them, for each combination of the axes.

Writes sweep.md, a table with the best cell first, pictures of the metric over network evaluations and over the
guidance scale, and for each cell the numbers and a picture of samples. An interrupted sweep continues when the same
command is given again: finished cells and samples are kept, and values may be added to axes. `accelerate launch
eval/sweep.py` shares the work among processes.
"""

import contextlib
import copy
import itertools
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..data.raw_images import RawImageArguments
from ..metrics.extraction import Reference, measure_dims
from ..metrics.extractors import ExtractorArguments, FeatureExtractor
from ..metrics.registry import FULL_COUNT, METRICS, check_counts, check_metrics
from ..sampling.folder import weights_of
from ..sampling.generate import count_evaluations, describe_sampling
from ..sampling.settings import PipelineArguments, load_pipeline
from ..sdt import SDTPipeline
from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import FolderLock, check_writable, move_into, valid_json, write_json
from ..utils.fingerprint import differences
from ..utils.ranges import between
from ..utils.reading import read_json, walk_files
from .fid import FidArguments, FidSamplingArguments, MetricArguments, check_dimensions, compare
from .label_accuracy import shape_of_samples
from .make_reference import save_reference
from .sweep_axes import Cell, golden_section, parse_axes, parse_search, shown, simplified
from .sweep_report import LARGER_IS_BETTER, TABLE_FILE, write_report

SETTINGS_FILE, REFERENCE_FILE, CELLS_FOLDER, SAMPLES_FOLDER = "sweep.json", "reference.safetensors", "cells", "samples"
#: Digits of the values that a search tries.
DIGITS = 4


@dataclass(kw_only=True)
class SweepArguments(MetricArguments):
    """What to sweep over, and where to write the results."""

    output_dir: Path = field(metadata={"help": "Folder for the results: new, empty, or begun by the same command."})
    axes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Flags of sampling and their values, such as guidance_scale=1,1.5,2 guidance=cfg,decay "
            "guidance_interval=none,0.2:0.8."
        },
    )
    search: list[str] = field(
        default_factory=list,
        metadata={"help": "A number to search the best value of, with the ends: guidance_scale 1 4, say."},
    )
    search_evaluations: int = field(
        default=8,
        metadata={"help": "Cells of a search between its ends, for each combination of the axes."} | between(2, 100),
    )
    best_by: str = field(default="fid", metadata={"help": f"Metric to choose by: {', '.join(METRICS)}."})
    keep_samples: bool = field(default=False, metadata={"help": "Keep the samples of finished cells."})
    save_best: bool = field(
        default=False,
        metadata={"help": "Save scheduler, steps and guidance of the best cell in its --model's folder."},
    )


class Sweep:
    """Computes the metrics of cells, each once, on all processes.

    Args:
        args: What to sweep over.
        sampling_args: Settings of all cells that no axis changes.
        extractor: Computes the features.
        image_args: How to read the reference's images.
        num_workers: Processes that read images.

    Raises:
        ValueError: If a setting, a metric or a model cannot be used, before anything is sampled.
    """

    def __init__(
        self,
        args: SweepArguments,
        sampling_args: FidSamplingArguments,
        extractor: FeatureExtractor,
        image_args: RawImageArguments,
        num_workers: int = 0,
    ):
        self.args, self.sampling_args, self.extractor = args, sampling_args, extractor
        self.image_args, self.num_workers = image_args, num_workers
        self.axes = parse_axes(args.axes)
        self.search = parse_search(args.search, self.axes)
        self.reference = Reference.open(args.reference, image_args)
        self.finished: dict[str, tuple[Cell, dict[str, Any]]] = {}
        self._pipelines: dict[Any, SDTPipeline] = {}
        self._weights: dict[Any, str] = {}
        self._shapes: set[tuple[int, int, int]] = set()
        self._seconds, self._computed, self._done = 0.0, 0, 0
        self._check_arguments()
        #: The cells, or with a search the ones of its greatest number.
        self.cells = self._all_cells()
        self.total = sum(cell.evaluations for cell in self.cells)
        self.total *= args.search_evaluations + 2 if self.search else 1
        self._pipelines.clear()

    def _all_cells(self) -> list[Cell]:
        cells = {}
        for each in itertools.product(*self.axes.values()):
            values = dict(zip(self.axes, each, strict=True))
            if self.search is not None:
                name, low, high = self.search
                self.cell({**values, name: low})
                values[name] = high
            cell = self.cell(values)
            cells.setdefault(cell.name, cell)  # settings without effect make cells equal
        return list(cells.values())

    def _check_arguments(self) -> None:
        args, sampling_args = self.args, self.sampling_args
        models: list[Any] = self.axes.get("model", [sampling_args.model])
        if None in models:
            raise ValueError("Give a model, or several as an axis.")
        if sampling_args.samples_dir is not None:
            raise ValueError("samples_dir is the sweep's own; keep_samples keeps the samples in output_dir.")
        for each in fields(sampling_args):
            if each.name in self.axes and getattr(sampling_args, each.name) != each.default:
                raise ValueError(f"{each.name} is one of the axes: leave out the flag of that name.")
        if args.save_best and (sampling_args.height or sampling_args.width):
            raise ValueError("save_best saves settings for the trained grid: leave out height and width.")
        for model in models if args.save_best else []:
            if not Path(model, "model_index.json").is_file():
                raise ValueError(f"save_best writes to the folder of a pipeline, which {model} is not.")
        if args.metrics and args.best_by not in args.metrics:
            raise ValueError(f"best_by must be one of the metrics, {', '.join(args.metrics)}, not {args.best_by!r}.")
        metrics = [*args.metrics, args.best_by]
        check_metrics(metrics, self.extractor)
        self.reference.check(metrics, self.extractor)
        counts = (sampling_args.num_samples or FULL_COUNT, self.reference.count_features(args.num_features))
        check_counts(metrics, *counts, args.inception_splits, args.kid_subset_size)

    def cell(self, values: dict[str, Any]) -> Cell:
        """Return a cell, after opening its model and trying its settings.

        Args:
            values: Value of each axis, and of the number that is searched for.

        Raises:
            ValueError: If the settings do not fit together, or the model; names them.
        """
        try:
            sampling = simplified(replace(self.sampling_args, **values), values)
            pipe = copy.copy(self._open(str(sampling.model), sampling.dtype))
            sampling.apply_to(pipe)
            settings = sampling.settings(pipe)
            evaluations, sampler = count_evaluations(pipe, settings), describe_sampling(pipe, settings)
            self._check_shape(shape_of_samples(pipe, sampling.height, sampling.width))
        except (ValueError, FileNotFoundError) as error:
            where = ", ".join(f"{name}={shown(value)}" for name, value in values.items())
            raise ValueError(f"{where}: {error}" if where else str(error)) from error
        key = (sampling.model, sampling.guide_model, sampling.guidance, sampling.dtype)
        if key not in self._weights:
            self._weights[key] = weights_of(pipe)
        values = {name: getattr(sampling, name) for name in values}
        return Cell(values, sampling, evaluations, sampler, self._weights[key])

    def _check_shape(self, shape: tuple[int, int, int]) -> None:
        if shape not in self._shapes:
            found = measure_dims(self.extractor, shape)
            check_dimensions(self.args.reference, self.reference.dims(self.extractor), found)
            self._shapes.add(shape)

    def _open(self, model: str, dtype: Any) -> SDTPipeline:
        """Open a pipeline; the last one is kept."""
        if (model, dtype) not in self._pipelines:
            self._pipelines.clear()
            # Without guidance, since its own may be what the cells change because the model cannot give it.
            args = PipelineArguments(model=model, dtype=dtype, guidance_scale=1.0)
            self._pipelines[model, dtype] = load_pipeline(args, "cpu")
        return self._pipelines[model, dtype]

    def run(self) -> Cell | None:
        """Compute all cells, and write the report.

        Returns:
            The best cell on the main process, `None` on the others.

        Raises:
            ValueError: If the folder holds another sweep, or images of the reference cannot be used.
            OSError: If the disk cannot hold the results.
        """
        folder, state = self.args.output_dir, PartialState()
        with FolderLock(folder) if state.is_main_process else contextlib.nullcontext():
            if state.is_main_process:
                self._claim(folder)
            state.wait_for_everyone()
            reference = self._save_reference(folder / REFERENCE_FILE)
            for cell in self.cells:
                if self.search is None:
                    self.measure(cell, reference)
                else:
                    self._search(cell.values, reference)
            if not state.is_main_process:
                return None
            found = list(self.finished.values())
            best = write_report(folder, found, self.args.best_by, pictures=True, searched=self.args.search[:1])
            if self.args.save_best:
                save_defaults(best.sampling)
            return best

    def _search(self, values: dict[str, Any], reference: tuple[str, RawImageArguments]) -> None:
        name, low, high = self.search or ("", 0.0, 0.0)

        def measure(number: float) -> float:
            return self.measure(self.cell({**values, name: float(f"{number:.{DIGITS}g}")}), reference)

        golden_section(measure, low, high, self.args.search_evaluations)

    def measure(self, cell: Cell, reference: tuple[str, RawImageArguments]) -> float:
        """Compute the metrics of a cell unless they are known.

        Args:
            cell: The cell.
            reference: The reference, and how to read it.

        Returns:
            The metric to choose by, the lower the better.

        Raises:
            ValueError: If the cell cannot be computed, or was with other weights or defaults of the pipeline.
        """
        args, state = self.args, PartialState()
        output = args.output_dir / CELLS_FOLDER / f"{cell.name}.json"
        samples = args.output_dir / SAMPLES_FOLDER / cell.name
        known = record = self._read(output, cell)
        if record is None:
            start = time.monotonic()
            if state.is_main_process:
                output.with_suffix(".png").unlink(missing_ok=True)  # of a record that was deleted
            given = {each.name: getattr(args, each.name) for each in fields(MetricArguments)}
            fid_args = FidArguments(**{**given, "reference": reference[0]}, output=output)
            sampling = replace(cell.sampling, samples_dir=str(samples))
            try:
                compare(fid_args, sampling, self.extractor, reference[1], self.num_workers)
            except ValueError as error:
                raise ValueError(f"{cell}: {error}") from error
            state.wait_for_everyone()
            self._seconds += time.monotonic() - start
            self._computed += cell.evaluations
            record = self._read(output, cell)
        if record is None or args.best_by not in record:
            raise ValueError(f"{output} holds no {args.best_by}: delete it, or choose best_by another metric.")
        self._done += cell.evaluations
        self.finished[cell.name] = (cell, record)
        if state.is_main_process:
            if not args.keep_samples:
                shutil.rmtree(samples, ignore_errors=True)
            if known is None:
                write_report(args.output_dir, list(self.finished.values()), args.best_by)
            label = record["labels"][args.best_by]
            print(f"{cell}: {label} {record[args.best_by]:.6g}{self._time_left()}", flush=True)
        return record[args.best_by] * (-1 if args.best_by in LARGER_IS_BETTER else 1)

    def _time_left(self) -> str:
        left = self.total - self._done
        if left <= 0 or not self._computed:
            return ""
        minutes, seconds = divmod(round(left * self._seconds / self._computed), 60)
        return f"; {self._done / self.total:.0%} done, {minutes}:{seconds:02d} left"

    def _read(self, path: Path, cell: Cell) -> dict[str, Any] | None:
        """Return the record of a finished cell as the main process finds it, on all processes."""
        found = [read_json(path) if PartialState().is_main_process and path.is_file() else None]
        record = broadcast_object_list(found)[0]
        if record is None:
            return None
        now = {"weights": cell.weights, "sampler": cell.sampler}
        there = {"weights": record["samples"].get("model_weights"), "sampler": record["samples"].get("sampler")}
        changes = differences(there, now)
        if changes:
            raise ValueError(
                f"{path} is of another model, or of other defaults of the pipeline ({'; '.join(changes)}): give "
                "another output_dir."
            )
        return record

    def _claim(self, folder: Path) -> None:
        """Refuse a folder that holds other files or another sweep; values of the axes may have changed."""
        path = folder / SETTINGS_FILE
        if not path.is_file() and any(walk_files(folder)):
            raise ValueError(f"{folder} holds something other than a sweep: give another output_dir.")
        for name in ("", CELLS_FOLDER, SAMPLES_FOLDER):
            check_writable(folder / name)
        changing = {*self.axes, *(self.search or ())[:1]}
        now = {
            **{each.name: getattr(self.args, each.name) for each in fields(MetricArguments)},
            **{key: value for key, value in asdict(self.sampling_args).items() if key not in changing},
            **asdict(self.image_args),
            **{f"extractor_{key}": value for key, value in self.extractor.identity.items()},
        }
        now = valid_json(json.loads(json.dumps(now, default=str)))
        if not any(any((folder / name).iterdir()) for name in (CELLS_FOLDER, SAMPLES_FOLDER)):
            (folder / REFERENCE_FILE).unlink(missing_ok=True)  # of a sweep that ended before its first cell
        else:
            there = read_json(path)
            both = set(there) & set(now)  # what was an axis then or is one now may change
            found = differences({key: there[key] for key in both}, {key: now[key] for key in both})
            if found:
                raise ValueError(f"{folder} holds another sweep ({'; '.join(found)}): give another output_dir.")
        write_json(path, now)

    def _save_reference(self, path: Path) -> tuple[str, RawImageArguments]:
        """Return the reference, whose features are computed once, and how to read it."""
        images = self.reference.images
        if self.reference.statistics is not None or images is None:
            return self.args.reference, self.image_args
        if not broadcast_object_list([path.is_file()])[0]:
            save_reference(path, images, self.extractor, self.args.num_features, self.num_workers)
            PartialState().wait_for_everyone()
        return str(path), RawImageArguments()


def save_defaults(sampling: FidSamplingArguments) -> None:
    """Save scheduler, steps and guidance as those that a pipeline uses by default; its networks stay as they are."""
    folder = Path(str(sampling.model))
    pipe = load_pipeline(replace(sampling, attention_backend=None, attention_prune_eps=0.0), "cpu")
    settings = sampling.settings(pipe)
    if pipe.guider is not None:
        pipe.guider.guidance_scale = settings["guidance_scale"]
    pipe.register_to_config(**{name: settings[name] for name in ("guidance_scale", "num_inference_steps")})

    def save(partial: Path) -> None:
        parts = {"scheduler": pipe.scheduler, "guider": pipe.guider, "guide_transformer": pipe.guide_transformer}
        for name, part in parts.items():
            if part is not None:
                part.save_pretrained(partial / name)
        pipe.register_modules(guider=pipe.guider, guide_transformer=pipe.guide_transformer)
        pipe.save_config(partial)

    move_into(folder, save)


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    types = (SweepArguments, FidSamplingArguments, ExtractorArguments, RawImageArguments)
    args, sampling_args, extractor_args, image_args = parse_arguments(types, argv, description=__doc__)
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.local_main_process_first():  # one process downloads the weights
        extractor = extractor_args.build(state.device)
    best = Sweep(args, sampling_args, extractor, image_args, extractor_args.dataloader_num_workers).run()
    if best is not None:
        print(f"\nBest: {best}. All are in {args.output_dir / TABLE_FILE}.")


if __name__ == "__main__":
    main()
