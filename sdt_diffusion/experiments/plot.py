"""The picture of a study: losses over steps with bands over seeds, and differences to the baseline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import new_figure

#: Part of the steps whose losses, which would flatten the rest, do not set the scale.
EARLY = 0.2
BAND = 0.2

#: Seed -> results of its cell.
Cells = Mapping[int, Mapping[str, Any]]
#: Seed -> places and values.
Curves = Mapping[int, tuple[np.ndarray, np.ndarray]]


def plot_study(records: Mapping[str, Cells], baseline: str, label: str, path: Path) -> None:
    """Draw the held-out loss over steps, the paired difference to the baseline, and that by noise level if known.

    Lines are means over seeds, bands reach from the least to the largest seed.

    Args:
        records: Variant -> seed -> results.
        baseline: The variant that others are compared with.
        label: What the loss is.
        path: PNG to write.
    """
    from matplotlib import colormaps

    shown = {variant: cells for variant, cells in records.items() if cells}
    palette = colormaps["tab20" if len(records) > 10 else "tab10"]
    colors = {variant: palette(number % palette.N) for number, variant in enumerate(records)}
    by_noise = any("velocity_error_by_noise_level" in c["metrics"] for cells in shown.values() for c in cells.values())
    figure = new_figure(13 if by_noise else 9, 4.5)
    panels = figure.subplots(1, 3 if by_noise else 2)
    base = _curves(records[baseline])
    late: list[float] = []
    for variant, cells in shown.items():
        style = {"color": colors[variant], "label": variant}
        curves = _curves(cells)
        for steps, values in curves.values():
            late += values[steps > EARLY * steps[-1]].tolist()
        _draw(panels[0], curves, **style)
        if variant == baseline:
            for panel in panels[1:]:
                panel.axhline(0, **style)
            continue
        _draw(panels[1], _differences(curves, base), **style)
        if by_noise:
            by_level = _differences(_by_noise(cells), _by_noise(records[baseline]))
            _draw(panels[2], by_level, marker="o", markersize=3, **style)
    titles = (label, "difference to the baseline", "difference by noise level, at the end")
    for panel, title, x in zip(panels, titles, ("step", "step", "noise level"), strict=False):
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel(x)
        panel.grid(alpha=0.3)
    if late:
        low, high = min(late), max(late)
        panels[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    if shown:
        panels[0].legend(fontsize="small", ncols=2 if len(shown) > 8 else 1)
    figure.savefig(path, dpi=120)


def _curves(cells: Cells) -> Curves:
    """Return the held-out loss of each seed."""
    curves = {seed: cell["curves"]["held_out_loss"] for seed, cell in cells.items()}
    return {seed: (np.array(curve["steps"], float), np.array(curve["values"])) for seed, curve in curves.items()}


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
