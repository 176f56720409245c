"""The table and the pictures of a sweep."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..plots import new_figure
from ..utils.files import write_atomically
from .sweep_axes import Cell, describe, shown

TABLE_FILE = "sweep.md"
LARGER_IS_BETTER = ("inception_score", "precision", "recall")
#: Lines of a picture; more could not be told apart.
MAX_LINES = 10


Result = tuple[Cell, dict[str, Any]]


def write_report(
    folder: Path, results: Sequence[Result], best_by: str, pictures: bool = False, searched: Sequence[str] = ()
) -> Cell:
    """Write the table of a sweep, and pictures where an axis has several values.

    Args:
        folder: Where to.
        results: The cells and the records of `eval/fid.py`.
        best_by: The metric to choose by, a key of `METRICS`.
        pictures: Whether to draw them.
        searched: Names of numbers that were searched for.

    Returns:
        The best cell.
    """
    sign = -1 if best_by in LARGER_IS_BETTER else 1
    ranked = sorted(results, key=lambda result: (sign * result[1][best_by], result[0].evaluations))
    text = format_report(ranked)
    write_atomically(folder / TABLE_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    if pictures:
        for name, axis, label, position in (
            ("evaluations", "num_inference_steps", "network evaluations", lambda cell: cell.evaluations),
            ("guidance", "guidance_scale", "guidance scale", lambda cell: cell.values["guidance_scale"]),
        ):
            lines = lines_of(ranked, best_by, axis, position, searched)
            plot(folder / f"{name}.png", lines, axis, label, ranked[0][1]["labels"][best_by])
    return ranked[0][0]


def format_report(ranked: Sequence[Result]) -> str:
    """Return the table in Markdown, the best cell first, with what all cells share below."""
    cell, record = ranked[0]
    metrics = record["labels"]
    rows = [[*cell.values, "network evaluations", *metrics.values(), "cell"]]
    rows.append(["---"] * len(rows[0]))
    for cell, record in ranked:
        numbers = [f"{record[name]:.4g}" if name in record else "" for name in metrics]
        rows.append([*map(shown, cell.values.values()), str(cell.evaluations), *numbers, cell.name])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    best, record = ranked[0]
    samples, reference = record["samples"], record["reference"]
    origin = reference.get("images", reference["path"])
    notes = [
        f"Best: {best}.",
        f"{samples['count']} samples for each cell, from the same seeds; {best.sampler} for the best.",
        f"Reference: {reference.get('count', 'unknown number of')} images, {origin}.",
        *record["warnings"],
    ]
    return f"# Sweep\n\n{table}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def lines_of(
    ranked: Sequence[Result],
    metric: str,
    axis: str,
    position: Callable[[Cell], float],
    searched: Sequence[str] = (),
) -> dict[str, dict[float, list[float]]]:
    """Return a metric over an axis, a line for each combination of the others, the line of the best cell first.

    Args:
        ranked: The cells and their records, the best first.
        metric: The metric.
        axis: Name of the axis.
        position: Where a cell is on it.
        searched: Names of numbers that were searched for: all that were tried are on one line.

    Returns:
        The other values in words -> position -> values there, the best first.
    """
    lines: dict[str, dict[float, list[float]]] = {}
    for cell, record in ranked:
        if cell.values.get(axis) is not None:
            others = {name: value for name, value in cell.values.items() if name not in (axis, *searched)}
            line = lines.setdefault(describe(others), {})
            line.setdefault(position(cell), []).append(record[metric])
    return lines


def plot(path: Path, lines: dict[str, dict[float, list[float]]], axis: str, label: str, metric: str) -> None:
    """Draw the lines of `lines_of` through the best values, with a dot for each other; nothing at one position only.

    Args:
        path: PNG to write.
        lines: The lines.
        axis: Name of the axis.
        label: Label of the x axis.
        metric: Label of the y axis.
    """
    ticks = sorted({x for line in lines.values() for x in line})
    if len(ticks) < 2:
        return
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for name, line in list(lines.items())[:MAX_LINES]:
        best = sorted((x, values[0]) for x, values in line.items())
        (drawn,) = axes.plot(*zip(*best, strict=True), marker="o", markersize=4, label=name)
        others = [(x, value) for x, values in line.items() for value in values[1:]]
        if others:
            axes.plot(*zip(*others, strict=True), marker=".", linestyle="none", color=drawn.get_color())
    if axis == "num_inference_steps":
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(label)
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    title = f"the best {MAX_LINES} of {len(lines)}" if len(lines) > MAX_LINES else None
    if any(lines):
        axes.legend(fontsize="small", title=title)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120))
