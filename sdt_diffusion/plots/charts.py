"""Draw the curves of a training run, and the confusion of a classifier."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib is imported where it draws: it takes a second, and most of the package does without.


def plot_loss_curve(records: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the loss over steps, with what else is known: held-out loss, losses by timestep, FID, learning rate.

    Args:
        records: Dictionaries with a `step` and any of `loss` (with `learning_rate` and "loss_by_timestep/..."),
            `validation_loss`, and values whose names begin with "fid"; others are left out.
        path: PNG to write.
    """
    logged = [record for record in records if "loss" in record]
    named = {key for record in records for key in record if key.lower().startswith("fid")}
    scores = sorted(key for key in named if len(_points(records, key)[0]))
    heights = [4, 4, *([3] if scores else []), 1]
    figure = _new_figure(8, 8 * sum(heights) / 9)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _plot_losses(logged, _points(records, "validation_loss"), panels[0])
    _plot_losses_by_timestep(logged, panels[1])
    for key in scores:
        steps, values = _points(records, key)
        panels[2].plot(steps, values, marker="o", markersize=4, label=key)
    if scores:
        panels[2].set_ylabel("FID")
        panels[2].grid(alpha=0.3)
        panels[2].legend(fontsize="small")
    panels[-1].plot(*_points(logged, "learning_rate"), color="tab:gray")
    panels[-1].set_ylabel("learning rate")
    panels[-1].set_xlabel("step")
    panels[-1].set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def plot_accuracy_curve(records: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the test accuracy over steps, with the losses of training and test below.

    Args:
        records: Dictionaries with `step` and `loss`, or with `step`, `test_accuracy` and `test_loss`.
        path: PNG to write.
    """
    figure = _new_figure(8, 6)
    accuracy_axes, loss_axes = figure.subplots(2, 1, sharex=True)
    steps, accuracies = _points(records, "test_accuracy")
    accuracies = 100 * accuracies
    accuracy_axes.plot(steps, accuracies, color="tab:green", marker="o", markersize=4)
    accuracy_axes.annotate(
        f"{accuracies[-1]:.2f}%", (steps[-1], accuracies[-1]), xytext=(-4, -14), textcoords="offset points", ha="right"
    )
    accuracy_axes.set_ylabel("test accuracy, %")
    logged_steps, losses = _points(records, "loss")
    loss_axes.plot(logged_steps, losses, color="tab:blue", alpha=0.3)
    loss_axes.plot(logged_steps, _smooth(losses), color="tab:blue", label="training, with its augmentation")
    loss_axes.plot(*_points(records, "test_loss"), color="tab:green", label="test")
    loss_axes.set_ylabel("loss")
    loss_axes.set_xlabel("step")
    loss_axes.legend()
    for axes in (accuracy_axes, loss_axes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _plot_losses(
    records: Sequence[Mapping[str, float]], validation: tuple[np.ndarray, np.ndarray], axes: "Axes"
) -> None:
    """Draw the training loss as logged and smoothed, and the held-out loss if there is any."""
    steps, losses = _points(records, "loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="logged")
    axes.plot(steps, _smooth(losses), color="tab:blue", label="smoothed")
    if len(validation[0]):
        axes.plot(*validation, color="tab:orange", marker="o", markersize=4, label="held-out images")
    if len(losses):  # the first steps would flatten all that comes after them
        shown = np.concatenate([losses, validation[1]])
        axes.set_ylim(0.95 * shown.min(), 1.05 * np.percentile(shown, 98))
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_losses_by_timestep(records: Sequence[Mapping[str, float]], axes: "Axes") -> None:
    """Draw a curve for each range of timesteps, from dark for the least noise to bright for the most."""
    from matplotlib import colormaps

    ranges = sorted({key for record in records for key in record if key.startswith("loss_by_timestep/")})
    for key, shade in zip(ranges, np.linspace(0, 0.9, len(ranges)), strict=True):
        steps, losses = _points(
            [record for record in records if record.get(key)], key
        )  # no 0: the axis is logarithmic
        label = key.removeprefix("loss_by_timestep/")
        axes.semilogy(steps, _smooth(losses), color=colormaps["viridis"](shade), label=label)
    axes.set_ylabel("error by timestep")
    axes.grid(alpha=0.3, which="both")
    if ranges:
        axes.legend(ncols=2, fontsize="small")


def _points(records: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps at which a value is known, and the value there."""
    known = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    steps, values = np.array(known, dtype=float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the centered moving average over about 1/20 of the values, narrower at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    center = np.arange(len(values))
    reach = np.minimum(half, np.minimum(center, len(values) - 1 - center))
    return (sums[center + reach + 1] - sums[center - reach]) / (2 * reach + 1)


#: Numbers of classes up to which cells show their counts, and up to which classes are named. More classes are drawn in
#: at most so many groups.
MAX_NUMBERED, MAX_NAMED, MAX_GROUPS = 20, 40, 100
#: A square-root color scale shows the rare confusions, which are what one looks for.
COLOR_POWER = 0.5


def plot_confusion(counts: np.ndarray, class_names: Sequence[str], title: str, path: Path) -> None:
    """Draw which class (row) was taken for which (column), as fractions of the row's images.

    Up to 40 classes are named; of more, neighbors (which are related in many data sets) share a cell.

    Args:
        counts: Images, shape (classes, classes + 1); the last column, for labels that the data set does not have, is
            left out where it is empty.
        class_names: Name of each class.
        title: Above the picture.
        path: PNG to write.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import PercentFormatter

    named, numbered = len(class_names) <= MAX_NAMED, len(class_names) <= MAX_NUMBERED
    per_cell = 1 if named else -(-len(class_names) // MAX_GROUPS)
    counts = _grouped(counts if counts[:, -1].any() else counts[:, :-1], per_cell)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = counts.shape
    side = 3.5 + columns * (0.42 if numbered else 0.22) if named else 11
    figure = _new_figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(COLOR_POWER, 0, 1), interpolation="nearest")
    ticks = list(range(rows) if named else range(0, rows, -(-rows // 10)))
    names = [_shorten(name) for name in class_names] if named else [str(tick * per_cell) for tick in ticks]
    axes.set_yticks(ticks, names)
    if columns > rows:
        ticks, names = [*ticks, columns - 1], [*names, "other"]
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    if numbered:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if fractions[row, column] > 0.4 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    kind = "class" if named else f"class by number, {per_cell} neighbors in a cell"
    axes.set_xlabel(f"predicted {kind}")
    axes.set_ylabel(f"true {kind}")
    axes.set_title(title)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, format=PercentFormatter(1))
    bar.set_label("of the row's images (color grows with the square root)")
    figure.savefig(path, dpi=120)


def _grouped(counts: np.ndarray, size: int) -> np.ndarray:
    """Sum over groups of neighboring classes; the column of other labels stays by itself."""
    rows, columns = counts.shape
    counts = np.add.reduceat(counts, range(0, rows, size), axis=0)
    return np.add.reduceat(counts, [*range(0, rows, size), *range(rows, columns)], axis=1)


def _shorten(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _new_figure(width: float, height: float) -> "Figure":
    """Return a figure that is drawn to files only, without a backend that may need a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
