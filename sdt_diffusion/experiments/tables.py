"""Tables of a study from the results of its cells, with paired differences."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .reach import NOISE_LEVEL
from .statistics import paired_difference, steps_to_reach
from .study import Study

Results = Mapping[tuple[str, int], Mapping[str, Any]]
#: Seed -> results of its cell.
Cells = Mapping[int, Mapping[str, Any]]
#: Shares of the steps at which early losses are compared.
EARLY_SHARES = (0.1, 0.25, 0.5)
#: Share of the steps from which on differences are averaged.
LATE_SHARE = 0.5


class Metric(NamedTuple):
    """The number that a study compares.

    Attributes:
        key: Its name among the metrics and the curves of results files.
        words: What it is.
        digits: Digits that are shown.
        difference_digits: Digits of differences that are shown.
        is_share: Whether it is a share, which is shown in percent, and the higher the better.
    """

    key: str
    words: str
    digits: int
    difference_digits: int
    is_share: bool


#: Trainer -> what its studies compare.
MAIN_METRICS = {
    "train_dit": Metric("held_out_loss", "held-out error of the velocity", 4, 5, False),
    "train_classifier": Metric("accuracy", "test accuracy", 2, 2, True),
}
FD = Metric("fd", "FD", 2, 2, False)
SAMPLE_ACCURACY = Metric("sample_accuracy", "accuracy of samples", 1, 1, True)


def finished(study: Study, results: Results, variant: str) -> dict[int, Mapping[str, Any]]:
    """Return the results of a variant's cells that have run and not failed, by seed."""
    found = {seed: results.get((variant, seed)) for seed in study.seeds}
    return {seed: record for seed, record in found.items() if record is not None and record["failed"] is None}


def table(study: Study, results: Results) -> str:
    """Return the table of a study: a row for each variant."""
    baseline, metric = finished(study, results, study.baseline), MAIN_METRICS[study.trainer]
    reached = f"steps to the baseline's {'accuracy' if metric.is_share else 'loss'}"
    return _table(
        study,
        {variant: finished(study, results, variant) for variant in study.variants},
        {
            **_compared(study, results, metric),
            "test loss": lambda cells: _mean(cells, "held_out_loss", 4) if metric.is_share else "",
            **_compared(study, results, FD),
            SAMPLE_ACCURACY.words: _mean_of(SAMPLE_ACCURACY),
            reached: lambda cells: _steps_to_baseline(cells, baseline, metric),
            "time a step": lambda cells: _relative_time(cells, baseline),
            "parameters": lambda cells: ", ".join(sorted({f"{cell['parameters']:,}" for cell in cells.values()})),
        },
    )


def early_table(study: Study, results: Results) -> str:
    """Return the table of paired differences to the baseline early in training; empty for a study of one variant."""
    if len(study.variants) < 2:
        return ""
    metric, baseline = MAIN_METRICS[study.trainer], finished(study, results, study.baseline)

    def column(share: float) -> Callable[[Cells], str]:
        return lambda cells: _difference(
            _at_share(cells, baseline, metric, share), _at_share(baseline, baseline, metric, share), metric
        )

    def late(cells: Cells) -> str:
        return _difference(_late_mean(cells, baseline, metric), _late_mean(baseline, baseline, metric), metric)

    others = {name: finished(study, results, name) for name in study.variants if name != study.baseline}
    columns = {f"at {share:.0%} of the steps": column(share) for share in EARLY_SHARES}
    text = _table(study, others, {**columns, f"mean from {LATE_SHARE:.0%} on": late})
    return f"Differences to {study.baseline} on the way:\n\n{text}" if any(others.values()) and baseline else ""


def grid_tables(study: Study, results: Results) -> list[str]:
    """Return a table for each other resolution that cells were measured at."""
    sides = study.evaluation.resolutions

    def at(side: int) -> Callable[[Cells], dict[int, Any]]:
        return lambda cells: {
            seed: {**cell, "metrics": cell["metrics"]["resolutions"][str(side)]}
            for seed, cell in cells.items()
            if str(side) in cell["metrics"].get("resolutions", {})
        }

    tables = []
    for side in sides:
        rows = {variant: at(side)(finished(study, results, variant)) for variant in study.variants}
        columns = {
            **_compared(study, results, MAIN_METRICS[study.trainer], at(side)),
            **_compared(study, results, FD, at(side)),
            SAMPLE_ACCURACY.words: _mean_of(SAMPLE_ACCURACY),
            "best scaling": _scalings,
        }
        tables.append(f"At {side}x{side} pixels:\n\n{_table(study, rows, columns)}")
    return tables


def gates_table(study: Study, results: Results) -> str:
    """Return a table of the gates: how far each head looks, first and last; empty if no cell describes gates."""
    cells = {variant: finished(study, results, variant) for variant in study.variants}
    with_gates = {variant: found for variant, found in cells.items() if any(_rates(found, "gate_rate", -1))}
    if not with_gates:
        return ""
    text = _table(
        study,
        with_gates,
        {
            "distance that halves attention, by head: first, last": _half_distances,
            "spread over patches": lambda cells: f"{np.mean(list(_rates(cells, 'gate_spread', -1).values())):.2f}",
            "rate at much noise by that at little": _noise_ratio,
            "gradient of W_g: first, last": lambda cells: _gradients(cells, ("proj.weight",)),
            "gradient of alpha: first, last": lambda cells: _gradients(cells, ("log_alpha", "signed_alpha")),
        },
    )
    return f"The gates; means over blocks and seeds, distances in patches:\n\n{text}"


def way_table(study: Study, results: Results) -> str:
    """Return a table of what the log of the first seed's run shows on the way, beside what it ends with."""
    metric, seed = MAIN_METRICS[study.trainer], study.seeds[0]
    cells = {variant: finished(study, results, variant).get(seed) for variant in study.variants}
    runs = {variant: {seed: cell} for variant, cell in cells.items() if cell is not None}
    if not runs:
        return ""
    last = max(cell["steps"] for found in runs.values() for cell in found.values())
    steps = [round(share * last) for share in (*EARLY_SHARES, 0.75, 1)]

    def at(step: int) -> Callable[[Cells], str]:
        return lambda cells: _mean(_at_step(cells, metric, step), metric.key, metric.digits, metric.is_share)

    columns = {f"step {step:,}": at(step) for step in steps}
    columns |= {end.words: _mean_of(end) for end in (FD, SAMPLE_ACCURACY)}
    rows = [[variant, *(column(found) for column in columns.values())] for variant, found in runs.items()]
    return _markdown([f"{metric.words}, seed {seed}", *columns], rows)


def attention_table(study: Study, results: Results) -> str:
    """Return a table of how far attention looks at each resolution; empty if no cell has measured it."""
    rows = {variant: _with_distances(finished(study, results, variant)) for variant in study.variants}
    rows = {variant: cells for variant, cells in rows.items() if cells}
    names = dict.fromkeys(name for cells in rows.values() for cell in cells.values() for name in cell["metrics"])
    if not names:
        return ""
    text = _table(study, rows, {name: partial(_mean, metric=name, digits=2) for name in names})
    return f"Mean distance, in patches, of what attention looks at, at a noise level of {NOISE_LEVEL}:\n\n{text}"


def _with_distances(cells: Cells) -> dict[int, Any]:
    """Return the cells that know how far attention looks, with that by the names of columns as their metrics."""
    found = {}
    for seed, cell in cells.items():
        sides = cell["metrics"].get("attention", {})
        first = {f"{side}x{side}, first block": np.mean(blocks[0]) for side, blocks in sides.items()}
        everywhere = {f"{side}x{side}, all blocks": np.mean(blocks) for side, blocks in sides.items()}
        if sides:
            found[seed] = {**cell, "metrics": {**first, **everywhere}}
    return found


def pruning_table(study: Study, results: Results) -> str:
    """Return a table of what skipping parts of attention costs and saves; empty if no cell was pruned."""
    rows = {}
    for variant in study.variants:
        cells = finished(study, results, variant)
        for eps in dict.fromkeys(eps for cell in cells.values() for eps in cell["metrics"].get("pruning", {})):
            pruned = {seed: {**cell, "metrics": cell["metrics"]["pruning"][eps]} for seed, cell in cells.items()}
            rows[f"{variant}, {float(eps):g}"] = pruned
    if not rows:
        return ""
    text = _table(
        study,
        rows,
        {
            "held-out error": lambda cells: _mean(cells, "held_out_loss", 5),
            "tiles that are computed": lambda cells: _mean(cells, "density", 1, percent=True),
            "time of the network": lambda cells: _mean(cells, "relative_time", 2),
        },
        "variant, share that may be skipped",
    )
    return (
        f"Trained networks that skip parts of their attention, on {study.evaluation.pruning_images} images:\n\n{text}"
    )


def _table(
    study: Study, rows: Mapping[str, Cells], columns: Mapping[str, Callable[[Cells], str]], first: str = "variant"
) -> str:
    """Return a table in Markdown, without columns that are empty."""
    lines = []
    for variant, cells in rows.items():
        name = f"{variant} (baseline)" if variant == study.baseline else variant
        count = "" if len(cells) == len(study.seeds) else f", {len(cells)} of {len(study.seeds)} seeds"
        lines.append([name + count, *(column(cells) if cells else "" for column in columns.values())])
    return _markdown([first, *columns], lines)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, without columns that are empty from the third one on."""
    shown = [number for number in range(len(header)) if number < 2 or any(row[number] for row in rows)]
    everything = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line[number] for number in shown)} |" for line in everything)


def _compared(
    study: Study, results: Results, metric: Metric, take: Callable[[Cells], Cells] = lambda cells: cells
) -> dict[str, Callable[[Cells], str]]:
    """Return the columns of a metric, and of its differences to the baseline and to `also_compare`."""

    def difference_to(variant: str) -> Callable[[Cells], str]:
        return lambda cells: _difference(cells, take(finished(study, results, variant)), metric)

    of = "" if metric is MAIN_METRICS[study.trainer] else f"{metric.words}, "
    others = {"the baseline": study.baseline, **{name: name for name in study.also_compare}}
    return {
        metric.words: _mean_of(metric),
        **{f"{of}difference to {words}": difference_to(variant) for words, variant in others.items()},
    }


def _values(cells: Cells, metric: str) -> dict[int, float]:
    return {seed: cell["metrics"][metric] for seed, cell in cells.items() if cell["metrics"].get(metric) is not None}


def _mean_of(metric: Metric) -> Callable[[Cells], str]:
    return lambda cells: _mean(cells, metric.key, metric.digits, metric.is_share)


def _mean(cells: Cells, metric: str, digits: int, percent: bool = False) -> str:
    """Return the mean over seeds, and the standard deviation if there are several."""
    values = np.array(list(_values(cells, metric).values())) * (100 if percent else 1)
    if not len(values):
        return ""
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}{'%' if percent else ''}"


def _difference(cells: Cells, others: Cells, metric: Metric) -> str:
    """Return the mean difference over the seeds that both have, its interval, and p; of shares in points."""
    own, other = _values(cells, metric.key), _values(others, metric.key)
    seeds = [seed for seed in own if seed in other]
    if cells == others or not seeds:
        return ""
    scale, digits = 100 if metric.is_share else 1, metric.difference_digits
    found = paired_difference([scale * own[seed] for seed in seeds], [scale * other[seed] for seed in seeds])
    if math.isnan(found.low):
        return f"{found.mean:+.{digits}f}"
    interval = f"[{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.mean:+.{digits}f} {interval}, p = {found.p_value:.2g}"


def _at_step(cells: Cells, metric: Metric, step: float) -> dict[int, Any]:
    """Return cells whose main metric is that at a step, interpolated on their curves, where they reach to it."""
    found = {}
    for seed, cell in cells.items():
        curve = cell["curves"][metric.key]
        if curve["steps"] and curve["steps"][0] <= step <= curve["steps"][-1]:
            value = float(np.interp(step, curve["steps"], curve["values"]))
            found[seed] = {**cell, "metrics": {metric.key: value}}
    return found


def _at_share(cells: Cells, baseline: Cells, metric: Metric, share: float) -> dict[int, Any]:
    """Return cells whose main metric is that at a share of the baseline's steps of the same seed."""
    return {
        seed: at_step
        for seed, cell in cells.items()
        if seed in baseline
        for at_step in _at_step({seed: cell}, metric, share * baseline[seed]["steps"]).values()
    }


def _late_mean(cells: Cells, baseline: Cells, metric: Metric) -> dict[int, Any]:
    """Return cells whose main metric is its mean from LATE_SHARE to all of the baseline's steps of the same seed."""
    found = {}
    for seed, cell in cells.items():
        curve = cell["curves"][metric.key]
        last = baseline[seed]["steps"] if seed in baseline else math.inf
        if curve["steps"] and curve["steps"][-1] >= last:
            inside = [
                value
                for step, value in zip(curve["steps"], curve["values"], strict=True)
                if LATE_SHARE * last <= step <= last
            ]
            found[seed] = {**cell, "metrics": {metric.key: float(np.mean(inside))}}
    return found


def _steps_to_baseline(cells: Cells, baseline: Cells, metric: Metric) -> str:
    """Return the mean number of steps to the last value on the baseline's curve, and how many seeds reach it."""
    reached, count, sign = [], 0, -1 if metric.is_share else 1
    for seed, cell in cells.items():
        if seed in baseline:
            count += 1
            target = sign * baseline[seed]["curves"][metric.key]["values"][-1]
            curve = cell["curves"][metric.key]
            step = steps_to_reach(curve["steps"], [sign * value for value in curve["values"]], target)
            if step is not None:
                reached.append(step / baseline[seed]["steps"])
    if not reached:
        return "not reached" if count else ""
    seeds = "" if len(reached) == count else f", {len(reached)} of {count} seeds"
    return f"{np.mean(reached):.0%}{seeds}"


def _relative_time(cells: Cells, baseline: Cells) -> str:
    """Return the mean ratio of the time a step to the baseline's of the same seed."""
    key = "seconds_per_step_first_decile"
    ratios = [cell[key] / baseline[seed][key] for seed, cell in cells.items() if seed in baseline]
    return f"{np.mean(ratios):.2f}" if ratios else ""


def _scalings(cells: Cells) -> str:
    """Return the scalings that were best, the most frequent first."""
    counts = Counter(cell["metrics"]["scaling"] for cell in cells.values())
    return "; ".join(words if len(counts) == 1 else f"{words} ({n})" for words, n in counts.most_common())


def _rates(cells: Cells, kind: str, position: int) -> dict[str, float]:
    """Return what curves `kind/BLOCK.NAME` hold at a position: BLOCK.NAME -> mean over seeds."""
    found: dict[str, list[float]] = {}
    for cell in cells.values():
        for key, curve in cell["curves"].items():
            if key.startswith(f"{kind}/") and curve["values"]:
                found.setdefault(key.partition("/")[2], []).append(curve["values"][position])
    return {name: float(np.mean(values)) for name, values in found.items()}


def _by_head(rates: Mapping[str, float]) -> list[float]:
    """Return the distance at which attention is halved of each head: ln(2) by the mean rate over blocks."""
    heads = sorted({int(name.partition(".")[2]) for name in rates})
    of_heads = [[rate for name, rate in rates.items() if int(name.partition(".")[2]) == head] for head in heads]
    return [math.log(2) * len(of_head) / sum(of_head) if sum(of_head) > 0 else math.inf for of_head in of_heads]


def _half_distances(cells: Cells) -> str:
    first, last = (_by_head(_rates(cells, "gate_rate", position)) for position in (0, -1))
    return "; ".join(f"{a:.3g}, {b:.3g}" for a, b in zip(first, last, strict=True))


def _noise_ratio(cells: Cells) -> str:
    high, low = (sum(_rates(cells, f"gate_rate_{name}_noise", -1).values()) for name in ("high", "low"))
    return f"{high / low:.2f}" if low else ""


def _gradients(cells: Cells, parameters: tuple[str, ...]) -> str:
    """Return the norm of the gradients of parameters over all blocks, at the first and the last validation."""
    norms = []
    for position in (0, -1):
        found = _rates(cells, "gate_gradient", position)
        norms.append(math.hypot(*(norm for name, norm in found.items() if name.endswith(parameters))))
    return f"{norms[0]:.2g}, {norms[1]:.2g}" if any(norms) else ""
