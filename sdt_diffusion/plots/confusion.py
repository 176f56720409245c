"""The confusion of a classifier."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

#: Up to so many classes have a number in each cell; up to so many have their names; more are drawn in so many groups.
MAX_NUMBERS, MAX_NAMES, MAX_GROUPS = 20, 40, 100
#: The colour's square-root scale brings out the rare confusions, which are what the picture is for.
COLOUR_POWER = 0.5


def plot_confusion(counts: np.ndarray, class_names: Sequence[str], title: str, path: Path) -> None:
    """Which class (row) was taken for which (column), as fractions of the row's images.

    Up to 40 classes are named; of more, neighbours (related, in many data sets) share a cell.

    Args:
        counts: Images, shape (classes, classes + 1); the last column, for labels that the data set does not have, is
            left out where it is empty.
        class_names: Name of each class.
        title: Above the picture.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    per_cell = 1 if len(class_names) <= MAX_NAMES else -(-len(class_names) // MAX_GROUPS)
    counts = _grouped(counts if counts[:, -1].any() else counts[:, :-1], per_cell)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = counts.shape
    named, numbered = len(class_names) <= MAX_NAMES, len(class_names) <= MAX_NUMBERS
    side = 3.5 + columns * (0.42 if numbered else 0.22) if named else 11
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    picture = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(COLOUR_POWER, 0, 1), interpolation="nearest")
    if named:
        ticks, names = range(rows), [_shorten(name) for name in class_names]
    else:
        ticks = range(0, rows, -(-rows // 10))
        names = [str(tick * per_cell) for tick in ticks]
    axes.set_yticks(ticks, names)
    if columns > rows:
        ticks, names = [*ticks, columns - 1], [*names, "other"]
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    if numbered:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if fractions[row, column] > 0.4 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    kind = "class" if named else f"class by number, {per_cell} neighbours a cell"
    axes.set_xlabel(f"predicted {kind}")
    axes.set_ylabel(f"true {kind}")
    axes.set_title(title)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, format=PercentFormatter(1))
    bar.set_label("of the row's images (colour grows with the square root)")
    figure.savefig(path, dpi=120)


def _grouped(counts, size):
    """Sums over groups of neighbouring classes; the column of other labels stays by itself."""
    rows, columns = counts.shape
    counts = np.add.reduceat(counts, range(0, rows, size), axis=0)
    return np.add.reduceat(counts, [*range(0, rows, size), *range(rows, columns)], axis=1)


def _shorten(name, length=24):
    return name if len(name) <= length else name[: length - 1] + "…"
