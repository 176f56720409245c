"""Run one cell in a process of its own: train, measure, and write its results file.

    python -m sdt_diffusion.experiments.cell JOB.json

The runner writes the job. A cell that is ended by a signal leaves a checkpoint and no results; the same job goes on.
"""

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..hub.run_record import RECORD_FILE, read_record
from ..metrics.extractors import build_extractor
from ..metrics.features import load_summary
from ..training.monitor import read_log
from ..utils.arguments import merged, one_line, parse_arguments
from ..utils.files import FolderLock, write_json
from ..utils.reading import read_json
from .locality import measure_gates, measure_pruning
from .measures import TRAINED, curves, describe_extractor, final_values, judge_samples, seconds_per_step
from .other_grids import measure_classifier, measure_generator
from .reach import measure_attention
from .result_files import describe_machine, write_result
from .study import TRAINERS, Evaluation

#: Arguments of trainers that name data.
NAMES_OF_DATA = ("dataset", "held_out_dataset", "validation_dataset", "class_names")
#: How long a cell waits for an earlier process to leave its folder: the runner may have been killed before it.
PATIENCE = 120.0


@dataclass(frozen=True)
class Job:
    """All that the process of a cell needs.

    Args:
        result: What its results file holds from the start: study, variant, seed and config.
        trainer: A key of `TRAINERS`.
        argv: The trainer's command line, without folders.
        evaluation: How it is judged, with folders of this machine.
        references: Side of images, or `TRAINED`, -> file of the reference's statistics; empty for no samples.
        folder: Folder to work in.
        output: The results file.
        keep_pipeline: Where to move what is trained; `None` to delete it.
    """

    result: dict[str, Any]
    trainer: str
    argv: list[str]
    evaluation: dict[str, Any]
    references: dict[str, str]
    folder: str
    output: str
    keep_pipeline: str | None

    def save(self) -> Path:
        """Write the job to its folder, and return the path."""
        path = Path(self.folder) / "job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))
        return path


def run_cell(job: Job) -> dict[str, Any]:
    """Train and measure, write the results file, and delete what is needed no more.

    A failure is a result too, and keeps the folder. Signals are none: they end the process.

    Returns:
        The record of the results file.
    """
    started, machine = time.monotonic(), describe_machine()
    folder = Path(job.folder)
    lock = _wait_for(folder)
    try:
        try:
            values = {**_measure(job, _train(job)), "failed": None}
        except SystemExit as error:
            if not isinstance(error.code, str):  # a signal; errors that users can correct have words
                raise
            values = {"failed": error.code.removeprefix("Error: ")}
        except Exception as error:
            traceback.print_exc()
            values = {"failed": f"{type(error).__name__}: {one_line(error)}"}
        record = {**job.result, **machine, "seconds": round(time.monotonic() - started, 1), **values}
        write_result(Path(job.output), record)
        if record["failed"] is None:
            _tidy(job)
    finally:
        lock.release()
    return record


def _train(job: Job) -> Path:
    """Call the trainer, or go on with what it has done, and return its folder."""
    folder = Path(job.folder) / "run"
    if not (folder / RECORD_FILE).is_file():  # which it writes last
        TRAINERS[job.trainer].main([*job.argv, f"--output_dir={folder}", "--resume_from_checkpoint=latest"])
    return folder


def _measure(job: Job, folder: Path) -> dict[str, Any]:
    """Return what the results file of a trained cell holds."""
    run, log = read_record(folder), read_log(folder)
    metrics: dict[str, Any] = final_values(job.trainer, log)
    evaluation = Evaluation(**job.evaluation)
    precision = "bf16" if run["config"].get("mixed_precision") == "bf16" else "no"
    references = {side: load_summary(Path(path)) for side, path in job.references.items()}
    extractor = build_extractor(evaluation.extractor) if references else None
    if extractor is not None:
        metrics |= judge_samples(folder, evaluation, references[TRAINED], extractor, precision)
        metrics["extractor"] = describe_extractor(evaluation, extractor)
    config = {**run["config"], **_data_arguments(job)}
    if evaluation.resolutions and job.trainer == "train_classifier":
        metrics["resolutions"] = measure_classifier(folder, config, evaluation, precision)
    elif evaluation.resolutions:
        metrics["resolutions"] = measure_generator(folder, config, evaluation, references, extractor, precision)
    if evaluation.gate_images:
        metrics["gates"] = measure_gates(folder, config, evaluation, precision)
    if evaluation.attention_images:
        metrics["attention"] = measure_attention(folder, config, evaluation, precision)
    if evaluation.prune_eps:
        metrics["pruning"] = measure_pruning(folder, config, evaluation, precision)
    here = {"output_dir": None, "logging_dir": None}
    return {
        "metrics": metrics,
        "curves": curves(job.trainer, log),
        **seconds_per_step(log, run["images_per_step"]),
        **{key: run[key] for key in ("parameters", "steps", "images_per_step")},
        "all_arguments": {key: value for key, value in run["config"].items() if key not in here},
    }


def _data_arguments(job: Job) -> dict[str, Any]:
    """Return the arguments that name data, of which the record of a run leaves out folders."""
    given = merged(*parse_arguments(TRAINERS[job.trainer].ARGUMENT_TYPES, job.argv))
    return {name: given[name] for name in NAMES_OF_DATA if name in given}


def _tidy(job: Job) -> None:
    run = Path(job.folder) / "run"
    if job.keep_pipeline is not None:
        kept = Path(job.keep_pipeline)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        for checkpoint in run.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        run.replace(kept)
    shutil.rmtree(run, ignore_errors=True)


def _wait_for(folder: Path) -> FolderLock:
    """Lock the folder, when an earlier process of the same cell has ended.

    Raises:
        ValueError: If it has not after `PATIENCE` seconds.
    """
    lock, until = FolderLock(folder), time.monotonic() + PATIENCE
    while True:
        try:
            lock.acquire()
            return lock
        except ValueError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def end_with_parent() -> None:
    """Let this process end like by SIGTERM when the runner is gone, as after SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job that the first argument names."""
    (path,) = sys.argv[1:] if argv is None else argv
    end_with_parent()
    record = run_cell(Job(**read_json(Path(path))))
    if record["failed"] is not None:
        print(record["failed"], file=sys.stderr)


if __name__ == "__main__":
    main()
