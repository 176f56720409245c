"""Curves of a training run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def plot_loss_curve(records: Sequence[dict[str, float]], path: Path) -> None:
    """Loss over steps, as logged and smoothed, with the losses by timestep and the learning rate below.

    Args:
        records: Dictionaries with `step`, `loss`, `learning_rate` and "loss_by_timestep/..."; others are left out.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [record for record in records if "loss" in record]
    steps = np.array([record["step"] for record in records])
    losses = np.array([record["loss"] for record in records])
    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, timestep_axes, rate_axes = figure.subplots(3, 1, sharex=True, height_ratios=[4, 4, 1])
    loss_axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="logged")
    loss_axes.plot(steps, _smooth(losses), color="tab:blue", label="smoothed")
    loss_axes.set_ylabel("loss")
    if len(losses):  # the first steps would flatten all that comes after them
        loss_axes.set_ylim(0.95 * losses.min(), 1.05 * np.percentile(losses, 98))
    loss_axes.grid(alpha=0.3)
    loss_axes.legend()
    _plot_losses_by_timestep(records, timestep_axes)
    rate_axes.plot(steps, [record["learning_rate"] for record in records], color="tab:gray")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("step")
    rate_axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def _plot_losses_by_timestep(records, axes):
    from matplotlib import colormaps

    ranges = sorted({key for record in records for key in record if key.startswith("loss_by_timestep/")})
    for key, shade in zip(ranges, np.linspace(0, 0.9, len(ranges)), strict=True):
        known = [(record["step"], record[key]) for record in records if record.get(key)]
        steps, losses = np.array(known).T
        label = key.removeprefix("loss_by_timestep/")
        axes.semilogy(steps, _smooth(losses), color=colormaps["viridis"](shade), label=label)
    axes.set_ylabel("error by timestep")
    axes.grid(alpha=0.3, which="both")
    if ranges:
        axes.legend(ncols=2, fontsize="small")


def plot_accuracy_curve(records: Sequence[dict[str, float]], path: Path) -> None:
    """Test accuracy over steps, with the losses of training and test below.

    Args:
        records: Dictionaries with `step` and `loss`, or with `step`, `test_accuracy` and `test_loss`.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logged = [record for record in records if "loss" in record]
    tested = [record for record in records if "test_accuracy" in record]
    steps = [record["step"] for record in tested]
    accuracies = [100 * record["test_accuracy"] for record in tested]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy_axes, loss_axes = figure.subplots(2, 1, sharex=True)
    accuracy_axes.plot(steps, accuracies, color="tab:green", marker="o", markersize=4)
    accuracy_axes.annotate(
        f"{accuracies[-1]:.2f}%", (steps[-1], accuracies[-1]), xytext=(-4, -14), textcoords="offset points", ha="right"
    )
    accuracy_axes.set_ylabel("test accuracy, %")
    losses = np.array([record["loss"] for record in logged])
    logged_steps = [record["step"] for record in logged]
    loss_axes.plot(logged_steps, losses, color="tab:blue", alpha=0.3)
    loss_axes.plot(logged_steps, _smooth(losses), color="tab:blue", label="training, with its augmentation")
    loss_axes.plot(steps, [record["test_loss"] for record in tested], color="tab:green", label="test")
    loss_axes.set_ylabel("loss")
    loss_axes.set_xlabel("step")
    loss_axes.legend()
    for axes in (accuracy_axes, loss_axes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about 1/20 of the values, narrower at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    reach = np.minimum(half, np.minimum(centre, len(values) - 1 - centre))
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


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
