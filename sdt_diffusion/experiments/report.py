"""Write tables and pictures of studies into the pages that ask for them, from the committed results files.

    python experiments/report.py

What stands in a page of docs/ between `<!-- results: STUDY -->` and `<!-- end of results -->` is replaced by the
results of experiments/STUDY.yaml; after `<!-- on the way: STUDY -->`, by the losses that a run of it shows on the way.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import write_atomically
from ..utils.ranges import CheckedArguments
from .plot import plot_gates, plot_reach, plot_study
from .result_files import read_results
from .study import Study, read_study
from .tables import (
    MAIN_METRICS,
    Results,
    attention_table,
    early_table,
    finished,
    gates_table,
    grid_tables,
    pruning_table,
    table,
    way_table,
)

SECTION = re.compile(
    r"(?P<start><!-- (?P<kind>results|on the way): (?P<study>[\w-]+) -->\n).*?(?P<end><!-- end of results -->)", re.S
)


@dataclass
class ReportArguments(CheckedArguments):
    """Where studies, results and pages are."""

    studies_dir: Path = field(default=Path("experiments"), metadata={"help": "Folder of the studies' YAML files."})
    results_dir: Path = field(default=Path("experiments/results"), metadata={"help": "Folder of the results files."})
    pages_dir: Path = field(default=Path("docs"), metadata={"help": "Folder of the pages, with images/."})


def fill_page(text: str, studies_dir: Path, results_dir: Path, draw: Callable[[Study, Results], list[str]]) -> str:
    """Return a page with the results of its studies.

    Args:
        text: The page.
        studies_dir: Folder of the studies.
        results_dir: Folder of the results files.
        draw: Draws the pictures of a study, and returns their paths relative to the page.

    Raises:
        OSError: If a study does not exist.
        ValueError: If a study or a results file is damaged, or they do not fit.
    """

    def section(match: re.Match) -> str:
        study = read_study(studies_dir / f"{match['study']}.yaml")
        results = read_results(results_dir, study)
        if match["kind"] == "on the way":
            return "\n\n".join([match["start"].rstrip("\n"), *on_the_way(study, results), match["end"]])
        parts = [describe(study, results)]
        if any(record["failed"] is None for record in results.values()):
            parts += [table(study, results), early_table(study, results), *grid_tables(study, results)]
            parts += [attention_table(study, results), gates_table(study, results), pruning_table(study, results)]
            parts += [f"![{study.title}]({path})" for path in draw(study, results)]
        return "\n\n".join(
            [match["start"].rstrip("\n"), *filter(None, parts), provenance(study, results), match["end"]]
        )

    return SECTION.sub(section, text)


def describe(study: Study, results: Results) -> str:
    """Return a paragraph on what was trained, and how it was judged."""
    records = [record for record in results.values() if record["failed"] is None]
    words = [f"{study.title}."]
    if records:
        steps, images = (_span(record[key] for record in records) for key in ("steps", "images_per_step"))
        seconds = median(record["seconds"] for record in records)  # one that was resumed counts from there on
        words.append(f"{steps} steps of {images} images; seeds {_listed(study.seeds)}; {seconds:.0f} seconds a cell.")
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


def on_the_way(study: Study, results: Results) -> list[str]:
    """Return the command that trains one variant, and the table of what its run shows."""
    command = f"{_command(study)} --seeds {study.seeds[0]} --variants {study.baseline} --keep_pipelines"
    return [f"`{command}`", way_table(study, results) or "Not run yet."]


def _command(study: Study) -> str:
    folders = "".join(f" --{name} {name.upper()}" for name in study.placeholders)
    return f"python experiments/run.py experiments/{study.name}.yaml{folders}"


def provenance(study: Study, results: Results) -> str:
    """Return the command, the cells that failed or have not run, and what made the results."""
    lines = [f"`{_command(study)}`"]
    failed = {cell.name: results[cell.variant, cell.seed]["failed"] for cell in study.cells() if _ran(results, cell)}
    lines += [f"Failed: {name}: {reason}" for name, reason in failed.items() if reason is not None]
    missing = _missing(study, results)
    if missing:
        lines.append(f"Not run: {', '.join(missing)}." if results else "Not run yet.")
    made = {key: _listed(sorted({str(record[key]) for record in results.values()})) for key in ("commit", "cpu")}
    packages = [record["versions"] for record in results.values()]
    versions = sorted({f"torch {each['torch']}, diffusers {each['diffusers']}" for each in packages})
    if results:
        lines.append(f"Commit {made['commit']}; {_listed(versions)}; {made['cpu']}.")
    return "\n\n".join(lines)


def _missing(study: Study, results: Results) -> list[str]:
    """Return the cells without results, those of a whole seed as one."""
    left: dict[int, list[str]] = {seed: [] for seed in study.seeds}
    for cell in study.cells():
        if not _ran(results, cell):
            left[cell.seed].append(cell.name)
    return [
        name
        for seed, names in left.items()
        for name in ([f"all of seed {seed}"] if len(names) == len(study.variants) else names)
    ]


def _ran(results: Results, cell: Any) -> bool:
    return (cell.variant, cell.seed) in results


def _span(values: Any) -> str:
    """Return the least and the largest of some numbers, rounded."""
    numbers = sorted({round(value) for value in values})
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def draw_pictures(pages_dir: Path, study: Study, results: Results) -> list[str]:
    """Draw the pictures of a study, and return their paths relative to the pages."""
    records = {variant: finished(study, results, variant) for variant in study.variants}
    (pages_dir / "images").mkdir(parents=True, exist_ok=True)
    metric = MAIN_METRICS[study.trainer]
    draw = {"": lambda path: plot_study(records, study.baseline, metric, path)}
    for ending, has, plot in (("_gates", has_gates, plot_gates), ("_reach", has_reach, plot_reach)):
        variant = _shown(study, [variant for variant, cells in records.items() if any(map(has, cells.values()))])
        if variant is not None:
            draw[ending] = partial(plot, records[variant], variant)
    names = {f"images/results_{study.name}{ending}.png": write for ending, write in draw.items()}
    for name, write in names.items():
        write_atomically(pages_dir / name, write)
    return list(names)


def _shown(study: Study, variants: Sequence[str]) -> str | None:
    """Return the variant whose gates are drawn: the baseline, or the first learned one."""
    learned = [variant for variant in variants if study.variants[variant].get("spatial_decay") != "fixed"]
    return next((each for each in (study.baseline, *learned, *variants) if each in variants), None)


def has_gates(record: Mapping[str, Any]) -> bool:
    """Return whether the results of a cell describe gates over steps."""
    return any(key.startswith("gate_rate/") for key in record["curves"])


def has_reach(record: Mapping[str, Any]) -> bool:
    """Return whether the results of a cell describe gates by noise level and class."""
    return bool(record["metrics"].get("gates"))


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse_arguments((ReportArguments,), argv, description=__doc__)
    pages = [page for page in sorted(args.pages_dir.glob("*.md")) if SECTION.search(page.read_text(encoding="utf-8"))]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        filled = fill_page(text, args.studies_dir, args.results_dir, partial(draw_pictures, args.pages_dir))
        page.write_text(filled, encoding="utf-8")
        print(f"Wrote {page}.")
    if not pages:
        sys.exit(f"No page of {args.pages_dir} has <!-- results: STUDY --> and <!-- end of results -->.")


if __name__ == "__main__":
    main()
