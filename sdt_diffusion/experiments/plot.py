"""The pictures of a study: curves with bands over seeds, differences to the baseline, and gates over steps."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..plots import new_figure
from .tables import FD, Cells, Metric

#: Part of the steps whose losses, which would flatten the rest, do not set the scale.
EARLY = 0.2
BAND = 0.2
#: Most variants whose curves can be told apart; more are drawn as rows.
MAX_LINES = 12
#: Least rate of a decay that is drawn.
LEAST_RATE = 1e-4

#: Most panels side by side.
MAX_COLUMNS = 4

#: Seed -> places and values.
Curves = Mapping[int, tuple[np.ndarray, np.ndarray]]


class Panel(NamedTuple):
    """One panel of the picture of a study.

    Attributes:
        title: What is drawn.
        x: What it is drawn over.
        curves_of: Makes the curves of a variant.
        paired: Whether differences to the baseline of the same seed are drawn.
    """

    title: str
    x: str
    curves_of: Callable[[Cells], Curves]
    paired: bool = True


def plot_study(records: Mapping[str, Cells], baseline: str, metric: Metric, path: Path) -> None:
    """Draw what a study compares over steps, the paired difference to the baseline, and what else is known of it.

    That is the difference by noise level, and the metric and FD by resolution. Lines are means over seeds, bands reach
    from the least to the largest seed. Of many variants, the last values are drawn as rows.

    Args:
        records: Variant -> seed -> results.
        baseline: The variant that others are compared with.
        metric: What is compared.
        path: PNG to write.
    """
    from matplotlib import colormaps

    if len(records) > MAX_LINES:
        return _plot_rows(records, baseline, metric, path)
    shown = {variant: cells for variant, cells in records.items() if cells}
    palette = colormaps["tab20" if len(records) > 10 else "tab10"]
    colors = {variant: palette(number % palette.N) for number, variant in enumerate(records)}
    measured = {key for cells in shown.values() for cell in cells.values() for key in cell["metrics"]}
    difference = "difference to the baseline"
    panels = [
        Panel(metric.words, "step", lambda cells: _curves(cells, metric), paired=False),
        Panel(difference, "step", lambda cells: _curves(cells, metric)),
    ]
    if "velocity_error_by_noise_level" in measured:
        panels.append(Panel(f"{difference}, by noise level", "noise level", _by_noise))
    if "resolutions" in measured:
        for of in (metric, FD) if FD.key in measured else (metric,):
            at_sides = partial(_by_resolution, metric=of)
            panels.append(Panel(f"{of.words} by resolution", "pixels", at_sides, paired=False))
            panels.append(Panel(f"{of.words}, {difference}", "pixels", at_sides))
    rows = math.ceil(len(panels) / MAX_COLUMNS)
    columns = math.ceil(len(panels) / rows)
    figure = new_figure(4.5 * columns, 4.5 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    late: list[float] = []
    for variant, cells in shown.items():
        for steps, values in _curves(cells, metric).values():
            late += values[steps > EARLY * steps[-1]].tolist()
        for axis, panel in zip(axes, panels, strict=False):
            _draw_variant(axis, panel, cells, records[baseline], color=colors[variant], label=variant)
    for axis, panel in zip(axes, panels, strict=False):
        axis.set_title(panel.title, fontsize="medium")
        axis.set_xlabel(panel.x)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.remove()
    first = axes[0]
    if late:
        low, high = min(late), max(late)
        first.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    if shown:
        first.legend(fontsize="small", ncols=2 if len(shown) > 8 else 1)
    figure.savefig(path, dpi=120)


def _draw_variant(axis: Any, panel: Panel, cells: Cells, base: Cells, **style: Any) -> None:
    """Draw one variant into a panel; the baseline is the zero line of differences."""
    if panel.paired and cells is base:
        axis.axhline(0, **style)
        return
    curves = panel.curves_of(cells)
    marker = {} if panel.x == "step" else {"marker": "o", "markersize": 3}
    _draw(axis, _differences(curves, panel.curves_of(base)) if panel.paired else curves, **marker, **style)


def _plot_rows(records: Mapping[str, Cells], baseline: str, metric: Metric, path: Path) -> None:
    """Draw the last values of all variants, a row for each: a dot for each seed, a bar for their mean."""
    measured = {key for cells in records.values() for cell in cells.values() for key in cell["metrics"]}
    shown = [(metric.key, metric.words), *([(FD.key, FD.words)] if FD.key in measured else [])]
    rows = {variant: number for number, variant in enumerate(reversed(list(records)))}
    figure = new_figure(5 * len(shown), 1 + 0.25 * len(rows))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (key, words) in zip(panels, shown, strict=True):
        for variant, cells in records.items():
            values = [cell["metrics"][key] for cell in cells.values() if key in cell["metrics"]]
            if values:
                color = "C1" if variant == baseline else "C0"
                panel.plot(values, [rows[variant]] * len(values), "o", color=color, markersize=4)
                panel.plot([np.mean(values)], [rows[variant]], "|", color=color, markersize=14)
                if variant == baseline:
                    panel.axvline(np.mean(values), color=color, linewidth=0.8)
        panel.set_title(words, fontsize="medium")
        panel.locator_params(axis="x", nbins=5)  # more labels overlap
        panel.grid(alpha=0.3)
    panels[0].set_yticks(list(rows.values()), list(rows), fontsize="small")
    figure.savefig(path, dpi=120)


def plot_gates(cells: Cells, variant: str, path: Path) -> None:
    """Draw the distance at which each head's attention is halved over steps, a panel for each block.

    Args:
        cells: Seed -> results, of a variant whose gates are described.
        variant: Its name.
        path: PNG to write.
    """
    names = sorted({key for cell in cells.values() for key in cell["curves"] if key.startswith("gate_rate/")})
    places = {name: tuple(map(int, name.partition("/")[2].split("."))) for name in names}
    blocks = sorted({block for block, _ in places.values()})
    figure = new_figure(3 * len(blocks), 3.5)
    panels = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    for name, (block, head) in places.items():
        curves = {}
        for seed, cell in cells.items():
            curve = cell["curves"].get(name, {"steps": [], "values": []})
            rates = np.maximum(np.array(curve["values"], float), LEAST_RATE)
            curves[seed] = (np.array(curve["steps"], float), np.log(2) / rates)
        _draw(panels[blocks.index(block)], curves, color=f"C{head % 10}", label=f"head {head}")
    for block, panel in zip(blocks, panels, strict=True):
        panel.set_title(f"{variant}, block {block}", fontsize="medium")
        panel.set_xlabel("step")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("patches that halve attention")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_reach(cells: Cells, variant: str, path: Path) -> None:
    """Draw the distance at which each head's attention is halved, over noise levels and by class.

    Args:
        cells: Seed -> results, of a variant whose gates are described; means over seeds are drawn.
        variant: Its name.
        path: PNG to write.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    measured = [cell["metrics"]["gates"] for cell in cells.values()]
    panels = {"noise level": "by_noise", "class": "by_class"}
    tables = {}
    for words, key in panels.items():
        columns = list(measured[0][key])
        rates = np.mean([[gates[key][column] for column in columns] for gates in measured], axis=0)  # (c, blocks, h)
        reach = np.log(2) / np.maximum(rates, LEAST_RATE)
        tables[words] = (columns, reach.reshape(len(columns), -1).T)  # (blocks * heads, columns)
    blocks, heads = np.shape(next(iter(measured[0]["by_noise"].values())))
    values = np.concatenate([table for _, table in tables.values()], axis=1)
    scale = LogNorm(values.min(), max(values.max(), values.min() * 1.01))
    figure = new_figure(11, 1.6 + 0.24 * blocks * heads)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (words, (columns, table)) in zip(axes, tables.items(), strict=True):
        image = panel.imshow(table, norm=scale, cmap="magma", aspect="auto")
        panel.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize="small")
        panel.set_title(f"{variant}, by {words}", fontsize="medium")
        for block in range(1, blocks):
            panel.axhline(block * heads - 0.5, color="white", linewidth=1)
    names = [f"block {block}, head {head}" for block in range(blocks) for head in range(heads)]
    axes[0].set_yticks(range(len(names)), names, fontsize="small")
    bar = figure.colorbar(image, ax=axes, format="{x:g}", ticks=LogLocator(subs=(1, 2, 5)))
    bar.minorticks_off()
    bar.set_label("patches that halve attention", fontsize="small")
    figure.savefig(path, dpi=120)


def _curves(cells: Cells, metric: Metric) -> Curves:
    """Return the curve of the metric of each seed."""
    curves = {seed: cell["curves"][metric.key] for seed, cell in cells.items()}
    return {seed: (np.array(curve["steps"], float), np.array(curve["values"])) for seed, curve in curves.items()}


def _by_resolution(cells: Cells, metric: Metric) -> Curves:
    """Return the final metric over the sides of images, the trained one among them if it is known."""
    found = {}
    for seed, cell in cells.items():
        points = {int(side): values[metric.key] for side, values in cell["metrics"].get("resolutions", {}).items()}
        trained = cell["all_arguments"].get("resolution")
        points |= {trained: cell["metrics"][metric.key]} if trained else {}
        found[seed] = (np.array(sorted(points), float), np.array([points[side] for side in sorted(points)]))
    return found


def _by_noise(cells: Cells) -> Curves:
    """Return the final error over the centers of the ranges of noise levels."""
    found = {}
    for seed, cell in cells.items():
        ranges = cell["metrics"]["velocity_error_by_noise_level"]
        centers = [np.mean([float(end) for end in name.split("-")]) for name in ranges]
        found[seed] = (np.array(centers), np.array(list(ranges.values())))
    return found


def _differences(curves: Curves, base: Curves) -> Curves:
    """Return the differences to the baseline's curve of the same seed, where both have points at equal places."""
    found = {}
    for seed, (places, values) in curves.items():
        if seed in base:
            both, own, other = np.intersect1d(places, base[seed][0], return_indices=True)
            found[seed] = (both, values[own] - base[seed][1][other])
    return found


def _draw(panel: Any, curves: Curves, color: Any, **style: Any) -> None:
    """Draw the mean over seeds, at the places that all have, and a band from the least to the largest."""
    if not curves:
        return
    common = sorted(set.intersection(*(set(places.tolist()) for places, _ in curves.values())))
    rows = np.array([values[np.isin(places, common)] for places, values in curves.values()])  # (seeds, places)
    panel.plot(common, rows.mean(axis=0), color=color, **style)
    if len(rows) > 1:
        panel.fill_between(common, rows.min(axis=0), rows.max(axis=0), color=color, alpha=BAND, linewidth=0)
