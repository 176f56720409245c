"""Pictures: grids of images, curves of training runs, and confusions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

#: Maximum number of columns of a grid whose caller does not set it.
MAX_COLUMNS = 10
#: Longest side to which a small image is enlarged.
MAX_ENLARGED = 2048
#: Minimum font size of labels, and their font size as a fraction of an image's width: labels of large images must stay
#: readable when the grid is scaled down.
MIN_FONT_SIZE, FONT_PART = 12, 1 / 8


def image_grid(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int | None = None,
    min_side: int = 64,
    gap: int = 4,
) -> Image.Image:
    """Draw a grid of images with their labels above them.

    A label is written only where it changes: an image without one has that of the image to its left, and a row without
    any has those of the row above.

    Args:
        images: Images of one size.
        labels: A text for each image. If one is too long, only the words before a first comma are written.
        columns: Images in a row. By default about as many as rows, at most 10, with one class in each column where the
            classes take turns.
        min_side: Small images are enlarged, pixel by pixel, to at least this side.
        gap: Pixels between images.

    Returns:
        The grid as an RGB image.

    Raises:
        ValueError: If there is no image, or not one label for each.
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"A grid needs images and a label for each; there are {len(images)} and {len(labels)}.")
    columns = columns or choose_columns(labels)
    zoom = max(1, min(-(-min_side // min(images[0].size)), MAX_ENLARGED // max(images[0].size)))
    labels = [printable(label).replace("\n", " ") for label in labels]
    width, height = (side * zoom for side in images[0].size)
    font_size = max(MIN_FONT_SIZE, round(width * FONT_PART))
    font = ImageFont.load_default(size=font_size)
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    shown = _where_labels_begin(labels, rows)
    texts = _fit(labels, font, width - font_size // 2)  # leave a space before the next label
    text_heights = [font_size * 4 // 3 if shown & set(row) else 0 for row in rows]
    size = (columns * (width + gap) + gap, sum(text_heights) + len(rows) * (height + gap) + gap)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    top = gap
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (width + gap)
            picture = images[i].convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (left, top + text_height))
            if i in shown:
                draw.text((left, top), texts[i], fill="black", font=font)
        top += text_height + height + gap
    return grid


def printable(text: str) -> str:
    """Return a text that fonts can draw: names of files may hold bytes that are no characters."""
    return text.encode("utf-8", "replace").decode()


def choose_columns(labels: Sequence[str]) -> int:
    """Return a number of columns for images with these labels; see `image_grid`."""
    about_square = min(MAX_COLUMNS, -int(-(len(labels) ** 0.5) // 1))
    classes = list(dict.fromkeys(labels))
    take_turns = all(label == classes[i % len(classes)] for i, label in enumerate(labels))
    if not take_turns or len(classes) > MAX_COLUMNS or len(labels) == len(classes):
        return about_square
    return max(len(classes), about_square // len(classes) * len(classes))


def _where_labels_begin(labels: Sequence[str], rows: Sequence[range]) -> set[int]:
    """Return the indices of the images whose labels are written."""
    texts = [[labels[i] for i in row] for row in rows]
    shown = set()
    for number, row in enumerate(rows):
        if number and texts[number] == texts[number - 1][: len(row)]:
            continue
        shown |= {i for i in row[1:] if labels[i] != labels[i - 1]}
        if number == 0 or set(texts[number - 1]) != {labels[row[0]]}:  # a row of one label continues in the next one
            shown.add(row[0])
    return shown


def _fit(labels: Sequence[str], font: Font, width: int) -> list[str]:
    """Shorten labels to a width: if one is too long, cut all at their first comma, then each at the width."""
    if any(font.getlength(label) > width for label in labels):
        labels = [label.partition(",")[0] for label in labels]
    return [_cut(label, font, width) for label in labels]


def _cut(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


# matplotlib is imported inside the functions that draw, because importing it takes a second.


def plot_loss_curve(records: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the loss over steps, with held-out loss, losses by timestep, FID and learning rate where they are known.

    Args:
        records: Dictionaries with a `step` and any of `loss` (with `learning_rate` and "loss_by_timestep/..."),
            `validation_loss`, and values whose names begin with "fid"; others are left out.
        path: PNG to write.
    """
    logged = [record for record in records if "loss" in record]
    named = {key for record in records for key in record if key.lower().startswith("fid")}
    scores = sorted(key for key in named if len(_points(records, key)[0]))
    heights = [4, 4, *([3] if scores else []), 1]
    figure = new_figure(8, 8 * sum(heights) / 9)
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
    figure = new_figure(8, 6)
    accuracy_axes, loss_axes = figure.subplots(2, 1, sharex=True)
    steps, accuracies = _points(records, "test_accuracy")
    accuracies = 100 * accuracies
    accuracy_axes.plot(steps, accuracies, color="tab:green", marker="o", markersize=4)
    for step, last in list(zip(steps, accuracies, strict=True))[-1:]:
        accuracy_axes.annotate(f"{last:.2f}%", (step, last), xytext=(-4, -14), textcoords="offset points", ha="right")
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
    if len(losses):  # otherwise the first steps would flatten the rest
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
    """Return the steps at which a value is known and finite, and the value there."""
    known = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    points = np.array(known, dtype=float).reshape(-1, 2)
    steps, values = points[np.isfinite(points).all(axis=1)].T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the centered moving average over about 1/20 of the values, narrower at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    center = np.arange(len(values))
    reach = np.minimum(half, np.minimum(center, len(values) - 1 - center))
    return (sums[center + reach + 1] - sums[center - reach]) / (2 * reach + 1)


#: Maximum number of classes for which cells show their counts, and for which classes are named; maximum number of
#: groups in which more classes are drawn.
MAX_NUMBERED, MAX_NAMED, MAX_GROUPS = 20, 40, 100
#: A square-root color scale makes rare confusions visible.
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
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(COLOR_POWER, 0, 1), interpolation="nearest")
    ticks = list(range(rows) if named else range(0, rows, -(-rows // 10)))
    names = [_shorten(name) for name in class_names] if named else [str(tick * per_cell) for tick in ticks]
    axes.set_yticks(ticks, names, parse_math=False)
    if columns > rows:
        ticks, names = [*ticks, columns - 1], [*names, "other"]
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    if numbered:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if fractions[row, column] > 0.4 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    kind = "class" if named else f"class by number, {per_cell} neighbors in a cell"
    axes.set_xlabel(f"predicted {kind}")
    axes.set_ylabel(f"true {kind}")
    axes.set_title(printable(title), parse_math=False)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, format=PercentFormatter(1))
    bar.set_label("of the row's images (color grows with the square root)")
    figure.savefig(path, dpi=120)


def _grouped(counts: np.ndarray, size: int) -> np.ndarray:
    """Sum over groups of neighboring classes; the column of other labels stays by itself."""
    rows, columns = counts.shape
    counts = np.add.reduceat(counts, range(0, rows, size), axis=0)
    return np.add.reduceat(counts, [*range(0, rows, size), *range(rows, columns)], axis=1)


def _shorten(name: str, length: int = 24) -> str:
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def new_figure(width: float, height: float) -> "Figure":
    """Return a figure that is drawn to files only, without a backend that may need a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
