"""Average the cells of sweeps over seeds and models, compare them with a baseline, and draw them.

    python benchmarks/sweeps.py outputs/samplers-flow --baseline "FlowMatchEuler 250" --results samplers.json
    python benchmarks/sweeps.py samplers.json --baseline "FlowMatchEuler 250" --picture samplers.png

Takes folders of eval/sweep.py, and files that `--results` wrote, which hold the numbers alone. A row of the table is a
way to sample: the mean of the metric over the models and seeds that it was measured with, its standard deviation, and
the mean and the standard deviation of its ratio to the baseline's of the same sweep, model and seed. The picture shows
the means, of the ratio if there is a baseline, over the evaluations of the network, up to about twice the least.
"""

import argparse
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sdt_diffusion.plots import new_figure
from sdt_diffusion.utils.files import write_atomically, write_json
from sdt_diffusion.utils.reading import read_json

#: Options that make another sampler of a scheduler, and what is said of images of another size than the trained one.
OPTIONS = {"FlowMatchSDEScheduler": ("diffusion",), "DDPMScheduler": ("variance_type", "timestep_spacing")}
SCALINGS = ("height", "pos_embed_scaling", "rotary_scaling", "decay_distance_scaling")
#: What the models and seeds of one row have in common.
KEY = ("sweep", "sampler", "evaluations", "guidance", "grid")
Row = dict[str, Any]


def rows_of(source: Path, metric: str) -> list[Row]:
    """Return the cells of a sweep, or the rows of a file of results."""
    if source.is_file():
        results = read_json(source)
        return [results["shared"] | row for row in results["rows"]]
    cells = [read_json(path) for path in sorted((source / "cells").glob("*.json"))]
    if not cells:
        raise SystemExit(f"{source} holds no cells of a sweep.")
    return [row_of(source, cell, metric) for cell in cells]


def row_of(source: Path, cell: dict[str, Any], metric: str) -> Row:
    """Return a cell's numbers, and what they are compared by."""
    made = cell["samples"]
    words = re.fullmatch(r"\w+, (\d+) steps, (\d+) network evaluations, guidance (.*), seed \d+", made["sampler"])
    if words is None:
        raise SystemExit(f"{source} is of another version, which wrote {made['sampler']!r}: make it again.")
    name = made["scheduler"]["_class_name"]
    options = [str(made["scheduler"][option]) for option in OPTIONS.get(name, ())]
    return {
        "sweep": source.name,
        "model": Path(made["model"]).name,
        "seed": made["seed"],
        "sampler": " ".join([re.sub("(Discrete|Multistep)?Scheduler$", "", name), *options, words[1]]),
        "evaluations": int(words[2]),
        "guidance": words[3],
        "grid": ", ".join(f"{name} {made[name]}" for name in SCALINGS if name in made),
        "value": round(cell[metric], 5),
        "label": cell["labels"][metric],
        "weights": made["model_weights"][:12],
        "extractor": cell["reference"]["weights"][:12],
        "versions": cell["versions"],
    }


def results_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the rows without what they share, and that, with the commit of the checkout."""
    shared = {name: value for name, value in rows[0].items() if all(row[name] == value for row in rows)}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    own = [{name: value for name, value in row.items() if name not in shared} for row in rows]
    return {"shared": {"commit": commit} | shared, "rows": own}


def averaged(rows: Sequence[Row], baseline: str | None) -> list[Row]:
    """Average over models and seeds; the rows are in the order of sweeps, samplers and evaluations."""
    of = {(row["sweep"], row["model"], row["seed"]): row["value"] for row in rows if row["sampler"] == baseline}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEY), []).append(row)
    table = []
    for key in sorted(groups, key=lambda key: (key[0], key[1].rpartition(" ")[0], *key[2:])):
        values = [row["value"] for row in groups[key]]
        origins = [(row["sweep"], row["model"], row["seed"]) for row in groups[key]]
        ratios = [value / of[origin] for value, origin in zip(values, origins, strict=True) if origin in of]
        numbers = {"shown": spread(values), "ratio": spread(ratios), "count": len(values)}
        # Ratios can be compared where some rows have fewer seeds than others.
        height = {"height": fmean(ratios if baseline else values)} if ratios or not baseline else {}
        table.append(dict(zip(KEY, key, strict=True)) | numbers | height)
    return table


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation in words."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return f"{fmean(values):.3f} ± {stdev(values):.3f}"


def draw(table: Sequence[Row], label: str, baseline: str | None, path: Path) -> None:
    """Draw the metric, or its ratio to the baseline, over the evaluations: a line for each sampler and guidance."""
    lines: dict[str, list[tuple[float, float]]] = {}
    table = [row for row in table if "height" in row]
    for row in table:
        name = row["sampler"].rpartition(" ")[0]
        name += f", {row['guidance']}" if len({other["guidance"] for other in table}) > 1 else ""
        lines.setdefault(name, []).append((row["evaluations"], row["height"]))
    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    if baseline:
        axes.axhspan(0.95, 1.05, color="0.9", label=f"5% around {baseline}")
    low = min(row["height"] for row in table)
    most = 2.2 * low  # what is worse is too bad to be told apart
    lines = {name: points for name, points in sorted(lines.items()) if min(height for _, height in points) < most}
    for index, (name, points) in enumerate(lines.items()):
        style = {"marker": "osD^vX"[index % 6], "linestyle": ("-", "--")[index // 6 % 2]}
        axes.plot(*zip(*sorted(points), strict=True), markersize=5, label=name, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_ylim(0.95 * low, most)
    axes.set_xticks([tick for tick in (5, 10, 20, 50, 100, 250) if tick <= max(row["evaluations"] for row in table)])
    axes.set_yticks([0.9, 1, 1.1, 1.25, 1.5, 1.75, 2] if baseline else [low * 2 ** (i / 4) for i in range(5)])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.set_xlabel("evaluations of the network")
    axes.set_ylabel(f"{label} over that of {baseline}" if baseline else label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=110))


def main() -> None:
    """Print a table in Markdown, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folders of sweeps, or files of results")
    parser.add_argument("--metric", default="fid")
    parser.add_argument("--baseline", help="sampler and steps that others are compared with")
    parser.add_argument("--results", type=Path, help="JSON file for the numbers alone")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    rows = [row for source in args.sources for row in rows_of(source, args.metric)]
    table = averaged(rows, args.baseline)
    columns = [name for name in KEY if len({row[name] for row in table}) > 1]
    columns += ["shown", *(["ratio"] if args.baseline else []), "count"]
    print(f"| {' | '.join(columns).replace('shown', rows[0]['label'])} |\n|{'---|' * len(columns)}")
    for row in table:
        print(f"| {' | '.join(str(row[name]) for name in columns)} |")
    if args.results:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.results, results_of(rows))
    if args.picture:
        draw(table, rows[0]["label"], args.baseline, args.picture)


if __name__ == "__main__":
    main()
