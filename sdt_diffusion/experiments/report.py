"""Write tables and pictures of studies into the pages that ask for them, from the committed results files.

    python experiments/report.py

What stands in a page of docs/ between `<!-- results: STUDY -->` and `<!-- end of results -->` is replaced by the
results of experiments/STUDY.yaml.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import write_atomically
from ..utils.ranges import CheckedArguments
from .measures import HELD_OUT
from .plot import plot_study
from .result_files import read_results
from .statistics import paired_difference, steps_to_reach
from .study import Study, read_study

SECTION = re.compile(r"(<!-- results: (?P<study>[\w-]+) -->\n).*?(<!-- end of results -->)", re.S)
#: What the trainer's held-out loss is, in words.
LOSS_NAMES = {
    "velocity_error": "held-out error of the velocity",
    "test_loss": "test loss",
}

Results = Mapping[tuple[str, int], Mapping[str, Any]]


@dataclass
class ReportArguments(CheckedArguments):
    """Where studies, results and pages are."""

    studies_dir: Path = field(default=Path("experiments"), metadata={"help": "Folder of the studies' YAML files."})
    results_dir: Path = field(default=Path("experiments/results"), metadata={"help": "Folder of the results files."})
    pages_dir: Path = field(default=Path("docs"), metadata={"help": "Folder of the pages, with images/."})


def fill_page(text: str, studies_dir: Path, results_dir: Path, draw: Callable[[Study, Results], str]) -> str:
    """Return a page with the results of its studies.

    Args:
        text: The page.
        studies_dir: Folder of the studies.
        results_dir: Folder of the results files.
        draw: Draws the picture of a study, and returns its path relative to the page.

    Raises:
        OSError: If a study does not exist.
        ValueError: If a study or a results file is damaged, or they do not fit.
    """

    def section(match: re.Match) -> str:
        study = read_study(studies_dir / f"{match['study']}.yaml")
        results = read_results(results_dir, study)
        lines = [describe(study, results), "", table(study, results), "", f"![{study.title}]({draw(study, results)})"]
        return match[1] + "\n" + "\n".join([*lines, "", provenance(study, results)]) + "\n\n" + match[3]

    return SECTION.sub(section, text)


def finished(study: Study, results: Results, variant: str) -> dict[int, Mapping[str, Any]]:
    """Return the results of a variant's cells that have run and not failed, by seed."""
    found = {seed: results.get((variant, seed)) for seed in study.seeds}
    return {seed: record for seed, record in found.items() if record is not None and record["failed"] is None}


def table(study: Study, results: Results) -> str:
    """Return the table of a study: a row for each variant."""
    baseline = finished(study, results, study.baseline)
    columns: dict[str, Callable[[Mapping[int, Mapping[str, Any]]], str]] = {
        LOSS_NAMES[HELD_OUT[study.trainer]]: lambda cells: _mean(cells, "held_out_loss", 4),
        "difference to the baseline": lambda cells: _difference(cells, baseline),
        "FD": lambda cells: _mean(cells, "fd", 2),
        "accuracy": lambda cells: _mean(cells, "accuracy", 2, percent=True),
        "accuracy of samples": lambda cells: _mean(cells, "sample_accuracy", 1, percent=True),
        "steps to the baseline's loss": lambda cells: _steps_to_baseline(cells, baseline),
        "time a step": lambda cells: _relative_time(cells, baseline),
        "parameters": lambda cells: ", ".join(sorted({f"{cell['parameters']:,}" for cell in cells.values()})),
    }
    rows = []
    for variant in study.variants:
        cells = finished(study, results, variant)
        name = f"{variant} (baseline)" if variant == study.baseline else variant
        count = "" if len(cells) == len(study.seeds) else f", {len(cells)} of {len(study.seeds)} seeds"
        rows.append([name + count, *(column(cells) if cells else "" for column in columns.values())])
    header = ["variant", *columns]
    shown = [number for number in range(len(header)) if number < 2 or any(row[number] for row in rows)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row[number] for number in shown)} |" for row in lines)


def _values(cells: Mapping[int, Mapping[str, Any]], metric: str) -> dict[int, float]:
    return {seed: cell["metrics"][metric] for seed, cell in cells.items() if cell["metrics"].get(metric) is not None}


def _mean(cells: Mapping[int, Mapping[str, Any]], metric: str, digits: int, percent: bool = False) -> str:
    """Return the mean over seeds, and the standard deviation if there are several."""
    values = np.array(list(_values(cells, metric).values())) * (100 if percent else 1)
    if not len(values):
        return ""
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}{'%' if percent else ''}"


def _difference(cells: Mapping[int, Mapping[str, Any]], baseline: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the mean difference of the held-out loss over the seeds that both have, its interval, and p."""
    own, other = _values(cells, "held_out_loss"), _values(baseline, "held_out_loss")
    seeds = [seed for seed in own if seed in other]
    if cells == baseline or not seeds:
        return ""
    found = paired_difference([own[seed] for seed in seeds], [other[seed] for seed in seeds])
    if math.isnan(found.low):
        return f"{found.mean:+.5f}"
    return f"{found.mean:+.5f} [{found.low:+.5f}, {found.high:+.5f}], p = {found.p_value:.2g}"


def _steps_to_baseline(cells: Mapping[int, Mapping[str, Any]], baseline: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the mean number of steps to the last loss on the baseline's curve, and how many seeds reach it."""
    reached, count = [], 0
    for seed, cell in cells.items():
        if seed in baseline:
            count += 1
            target = baseline[seed]["curves"]["held_out_loss"]["values"][-1]
            curve = cell["curves"]["held_out_loss"]
            step = steps_to_reach(curve["steps"], curve["values"], target)
            if step is not None:
                reached.append(step / baseline[seed]["steps"])
    if not reached:
        return "not reached" if count else ""
    seeds = "" if len(reached) == count else f", {len(reached)} of {count} seeds"
    return f"{np.mean(reached):.0%}{seeds}"


def _relative_time(cells: Mapping[int, Mapping[str, Any]], baseline: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the mean ratio of the time a step to the baseline's of the same seed."""
    key = "seconds_per_step_first_decile"
    ratios = [cell[key] / baseline[seed][key] for seed, cell in cells.items() if seed in baseline]
    return f"{np.mean(ratios):.2f}" if ratios else ""


def describe(study: Study, results: Results) -> str:
    """Return a paragraph on what was trained, and how it was judged."""
    records = [record for record in results.values() if record["failed"] is None]
    words = [f"{study.title}."]
    if records:
        steps, images, seconds = (
            _span(record[key] for record in records) for key in ("steps", "images_per_step", "seconds")
        )
        words.append(f"{steps} steps of {images} images; seeds {_listed(study.seeds)}; {seconds} seconds a cell.")
    judged = [record["metrics"] for record in records if "fd" in record["metrics"]]
    if judged:
        words.append(_describe_judge(judged))
    return " ".join(words)


def _describe_judge(judged: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on samples and extractor.

    Raises:
        ValueError: If cells were judged by different extractors.
    """
    extractors = {str(metrics["extractor"]): metrics["extractor"] for metrics in judged}
    if len(extractors) > 1:
        raise ValueError(f"The cells of one study were judged by different extractors: {' and '.join(extractors)}.")
    (extractor,) = extractors.values()
    top1 = extractor.get("top1")
    of = f"an extractor of top-1 accuracy {top1:.1%} on real images" if top1 is not None else "pixels"
    samplers = sorted({metrics["sampler"].rpartition(", seed")[0] for metrics in judged})
    return f"FD by {of} (weights {extractor['weights']}), {judged[0]['samples']:,} samples ({' or '.join(samplers)})."


def provenance(study: Study, results: Results) -> str:
    """Return the command, the cells that failed or have not run, and what made the results."""
    folders = "".join(f" --{name} {name.upper()}" for name in study.placeholders)
    lines = [f"`python experiments/run.py experiments/{study.name}.yaml{folders}`"]
    failed = {cell.name: results[cell.variant, cell.seed]["failed"] for cell in study.cells() if _ran(results, cell)}
    lines += [f"Failed: {name}: {reason}" for name, reason in failed.items() if reason is not None]
    missing = [cell.name for cell in study.cells() if not _ran(results, cell)]
    if missing:
        lines.append(f"Not run: {', '.join(missing)}.")
    made = {key: _listed(sorted({str(record[key]) for record in results.values()})) for key in ("commit", "cpu")}
    packages = [record["versions"] for record in results.values()]
    versions = sorted({f"torch {each['torch']}, diffusers {each['diffusers']}" for each in packages})
    if results:
        lines.append(f"Commit {made['commit']}; {_listed(versions)}; {made['cpu']}.")
    return "\n\n".join(lines)


def _ran(results: Results, cell: Any) -> bool:
    return (cell.variant, cell.seed) in results


def _span(values: Any) -> str:
    """Return the least and the largest of some numbers, rounded."""
    numbers = sorted({round(value) for value in values})
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def draw_picture(pages_dir: Path, study: Study, results: Results) -> str:
    """Draw the picture of a study, and return its path relative to the pages."""
    name = f"images/results_{study.name}.png"
    records = {variant: finished(study, results, variant) for variant in study.variants}
    label = LOSS_NAMES[HELD_OUT[study.trainer]]
    (pages_dir / name).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(pages_dir / name, lambda path: plot_study(records, study.baseline, label, path))
    return name


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse_arguments((ReportArguments,), argv, description=__doc__)
    pages = [page for page in sorted(args.pages_dir.glob("*.md")) if SECTION.search(page.read_text(encoding="utf-8"))]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        filled = fill_page(text, args.studies_dir, args.results_dir, partial(draw_picture, args.pages_dir))
        page.write_text(filled, encoding="utf-8")
        print(f"Wrote {page}.")
    if not pages:
        sys.exit(f"No page of {args.pages_dir} has <!-- results: STUDY --> and <!-- end of results -->.")


if __name__ == "__main__":
    main()
