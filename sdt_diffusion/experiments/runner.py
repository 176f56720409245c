"""Run a study: train all its variants with all its seeds, measure them, and write a results file for each.

    python experiments/run.py experiments/digits_smoke.yaml
    python experiments/run.py experiments/recipes_cifar10.yaml --data DIR --extractor DIR --processes_side_by_side 2

Each cell, a variant with a seed, is trained in a process of its own by the script that the study names. Ctrl-C and
SIGTERM end the study with checkpoints; the same command goes on, and repeats nothing. `experiments/report.py` writes
the results into pages.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..metrics.extractors import FeatureExtractor, build_extractor
from ..training.distributed import Interrupted, StopRequest
from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import FolderLock
from ..utils.ranges import CheckedArguments, between
from .cell import Job
from .measures import TRAINED, make_reference, reference_path
from .result_files import describe_machine, read_result, result_path, write_result
from .study import Cell, Study, read_study

#: What runs a cell; the path of its job follows.
COMMAND = [sys.executable, "-m", f"{__package__}.cell"]
#: Seconds between two looks at the processes.
INTERVAL = 0.5
#: Lines of a cell's output that are shown when its process fails without a results file.
SHOWN_LINES = 5


@dataclass(kw_only=True)
class RunnerArguments(CheckedArguments):
    """Which study to run, and where."""

    study: Path = field(metadata={"help": "YAML file of the study."})
    data: str | None = field(default=None, metadata={"help": "Folder that stands for {data} in the study."})
    extractor: str | None = field(default=None, metadata={"help": "Folder that stands for {extractor}."})
    pretrained: str | None = field(
        default=None,
        metadata={"help": "Folder that stands for {pretrained}, such as the pipelines that another study has kept."},
    )
    results_dir: Path = field(
        default=Path("experiments/results"), metadata={"help": "Folder of the results files, which are small."}
    )
    work_dir: Path = field(
        default=Path("outputs/experiments"), metadata={"help": "Folder of checkpoints, which may be deleted."}
    )
    variants: list[str] = field(default_factory=list, metadata={"help": "Run these variants only."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Run these seeds only."} | between(0, 2**63 - 1))
    processes_side_by_side: int | None = field(
        default=None,
        metadata={"help": "Cells at a time. Default: cores / cpu_threads of the study."} | between(1, 1024),
    )
    keep_pipelines: bool = field(
        default=False, metadata={"help": "Keep what is trained, in WORK_DIR/STUDY/pipelines/VARIANT-seedN."}
    )
    retry_failed: bool = field(default=False, metadata={"help": "Run cells anew whose results say that they failed."})


class Runner:
    """Runs the cells of a study, several side by side.

    Args:
        study: The study.
        args: Where to, and which cells.

    Raises:
        ValueError: If a variant or seed is not the study's, a folder for a placeholder is missing, or a results file
            is damaged or of other arguments.
    """

    def __init__(self, study: Study, args: RunnerArguments):
        self.study, self.args = study, args
        self.folder = args.work_dir / study.name
        threads = int(study.arguments.get("cpu_threads") or 1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.side_by_side = args.processes_side_by_side or max(1, cores // threads)
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.cells = [cell for cell in study.cells() if self._is_wanted(cell)]
        self.folders = {
            name: str(value) for name in study.placeholders if (value := getattr(args, name, None)) is not None
        }
        for cell in self.cells:
            cell.filled(self.folders)  # refuses placeholders without a folder now
        results = {cell.name: self._result(cell) for cell in self.cells}
        self.seconds = [record["seconds"] for record in results.values() if record and record["failed"] is None]
        self.waiting = [cell for cell in self.cells if self._is_to_run(results[cell.name])]

    def run(self) -> int:
        """Run all cells that have no results yet.

        Returns:
            The number of cells without results, or that have failed.

        Raises:
            Interrupted: After Ctrl-C or SIGTERM, when all processes have ended.
            ValueError: If another process runs the study in the same folder.
            OSError: If a process cannot be started.
        """
        done = len(self.cells) - len(self.waiting)
        print(f"{self.study.name}: {len(self.cells)} cells, {done} done, {self.side_by_side} at a time.", flush=True)
        running: list[tuple[Cell, subprocess.Popen]] = []
        bar = tqdm(total=len(self.cells), initial=done, desc=self.study.name, unit="cell")
        with FolderLock(self.folder), bar, StopRequest() as stop:
            references = self._make_references()
            try:
                while (self.waiting or running) and not stop.reason:
                    while self.waiting and len(running) < self.side_by_side:
                        cell = self.waiting.pop(0)
                        running.append((cell, self._start(cell, references)))
                    ended = [pair for pair in running if pair[1].poll() is not None]
                    running = [pair for pair in running if pair not in ended]
                    for cell, process in ended:
                        self._finish(cell, process.returncode, bar, len(running))
                    time.sleep(INTERVAL)
            finally:
                for _, process in running:
                    process.terminate()
                for _, process in running:
                    process.wait()
            if stop.reason and (self.waiting or running):
                print(f"Stopped by {stop.reason}. The same command goes on.", flush=True)
                raise Interrupted(stop.reason)
        records = [self._result(cell) for cell in self.cells]
        return sum(record is None or record["failed"] is not None for record in records)

    def _is_wanted(self, cell: Cell) -> bool:
        wanted = ((self.args.variants, self.study.variants, "variants"), (self.args.seeds, self.study.seeds, "seeds"))
        for chosen, known, name in wanted:
            strange = [value for value in chosen if value not in known]
            if strange:
                raise ValueError(
                    f"{name}: {strange[0]!r} is not in the study, which has {', '.join(map(str, known))}."
                )
        return cell.variant in (self.args.variants or [cell.variant]) and cell.seed in (self.args.seeds or [cell.seed])

    def _is_to_run(self, record: Mapping[str, Any] | None) -> bool:
        return record is None or (self.args.retry_failed and record["failed"] is not None)

    def _result(self, cell: Cell) -> dict[str, Any] | None:
        """Return the results of a cell, or `None` if there are none yet."""
        path = result_path(self.args.results_dir, cell)
        return read_result(path, cell) if path.is_file() else None

    def _make_references(self) -> dict[str, dict[str, str]]:
        """Compute the features of the references that waiting cells need, once.

        Returns:
            Cell -> side of the images -> file; see `Job`.
        """
        paths: dict[str, dict[str, str]] = {}
        extractors = dict[str, FeatureExtractor]()
        for cell in self.waiting:
            _, evaluation = cell.filled(self.folders)
            if evaluation.reference is None:
                continue
            name = evaluation.extractor
            extractors[name] = extractors.get(name) or build_extractor(name)
            sides = {TRAINED: cell.arguments.get("resolution"), **{str(side): side for side in evaluation.resolutions}}
            for key, side in sides.items():
                path = reference_path(self.folder, evaluation, side, extractors[name])
                make_reference(path, evaluation, side, extractors[name])
                paths.setdefault(cell.name, {})[key] = str(path)
        return paths

    def _start(self, cell: Cell, references: Mapping[str, dict[str, str]]) -> subprocess.Popen:
        """Start the process of a cell, whose output goes to a file; in a session of its own, without our Ctrl-C."""
        argv, evaluation = cell.filled(self.folders)
        folder = self.folder / cell.folder_name
        job = Job(
            result={"study": cell.study, "variant": cell.variant, "seed": cell.seed, "config": cell.config},
            trainer=cell.trainer,
            argv=argv,
            evaluation=asdict(evaluation),
            references=references.get(cell.name, {}),
            folder=str(folder),
            output=str(result_path(self.args.results_dir, cell)),
            keep_pipeline=str(self.folder / "pipelines" / cell.name) if self.args.keep_pipelines else None,
        )
        command = [*COMMAND, str(job.save())]
        with (folder / "output.txt").open("a") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    def _finish(self, cell: Cell, code: int, bar: tqdm, num_running: int) -> None:
        """Report a cell whose process has ended."""
        output = self.folder / cell.folder_name / "output.txt"
        record = self._result(cell)
        if record is None and 0 < code < 128:  # a bug: not a signal, and not even a failure that it could write
            failed = " ".join(output.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
            identity = {"study": cell.study, "variant": cell.variant, "seed": cell.seed, "config": cell.config}
            record = {**identity, **describe_machine(), "seconds": 0.0, "failed": failed or f"exit code {code}"}
            write_result(result_path(self.args.results_dir, cell), record)
        bar.update()
        if record is None:
            line = f"{cell.name}: ended by a signal; the same command goes on with it"
        elif record["failed"] is not None:
            line = f"{cell.name} FAILED: {record['failed']} (all of its output: {output})"
        else:
            self.seconds.append(record["seconds"])
            line = f"{cell.name}: {', '.join(_numbers(record['metrics']))} ({record['seconds']:.0f} s)"
        left = len(self.waiting) + num_running
        if left and self.seconds:
            minutes = left * sum(self.seconds) / len(self.seconds) / self.side_by_side / 60
            line += f"; {left} cell(s), about {minutes:.0f} min left" if minutes >= 1 else f"; {left} cell(s) left"
        bar.write(line)


def _numbers(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Return the main metrics in words."""
    for name, words in {"held_out_loss": "held-out loss", "fd": "FD", "sample_accuracy": "accuracy"}.items():
        if name in metrics:
            yield f"{words} {metrics[name]:.5g}"
    if "accuracy" in metrics:
        yield f"accuracy {metrics['accuracy']:.2%}"


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--study={argv[0]}"
    (args,) = parse_arguments((RunnerArguments,), argv, description=__doc__)
    missing = Runner(read_study(args.study), args).run()
    if missing:
        sys.exit(f"{missing} cell(s) failed or have not ended; see above.")


if __name__ == "__main__":
    main()
