"""The benchmark of attention, on a grid of 16 tokens, and the tables of sweeps: what they measure, write and draw."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")

    return run


def test_attention_is_measured_and_drawn(run, tmp_path, capsys):
    output, picture = tmp_path / "attention.json", tmp_path / "attention.png"
    sizes = ("--sides", 4, "--batch_sizes", 1, "--heads", 2, "--head_dim", 16, "--device", "cpu", "--threads", 1)
    run("attention.py", *sizes, "--rounds", 1, "--backends", "blockwise", "dense", "--output", output)
    results = json.loads(output.read_text())
    rows = [(row[""], row["attention"]) for row in results["rows"]]
    names = ("sdpa, no decay", "none", "blockwise", "dense")
    assert rows == [(mode, name) for mode in ("forward", "training") for name in names]
    assert [row["ratio"] for row in results["rows"] if row["attention"] == names[0]] == ["1.000", "1.000"]
    assert "| 16 | 1 | training | dense |" in capsys.readouterr().out
    run("attention.py", "--plot", output, "--picture", picture)
    assert Image.open(picture).width > 1000


def test_grids_without_a_batch_size_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("attention.py", "--sides", 4, 8, "--batch_sizes", 1)
    assert "2 sides need as many batch_sizes, not 1" in capsys.readouterr().err


@pytest.fixture
def sweep(tmp_path):
    """The cells of a sweep over two samplers and two seeds, as eval/sweep.py writes them."""
    for seed, steps, fid in ((0, 250, 2.0), (0, 10, 2.1), (1, 250, 4.0), (1, 10, 4.8)):
        scheduler = "UniPCMultistepScheduler" if steps == 10 else "FlowMatchEulerDiscreteScheduler"
        words = f"{scheduler}, {steps} steps, {steps} network evaluations, guidance 1, seed {seed}"
        made = {"model": "outputs/digits", "seed": seed, "sampler": words, "model_weights": "0123456789abcdef"}
        cell = {
            "fid": fid,
            "labels": {"fid": "FD(pixels)-500"},
            "samples": {**made, "scheduler": {"_class_name": scheduler}},
            "reference": {"weights": "none"},
            "versions": {"torch": "2"},
        }
        path = tmp_path / "samplers" / "cells" / f"{seed}-{steps}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cell))
    return tmp_path / "samplers"


def test_cells_of_sweeps_are_averaged_over_seeds_and_compared(run, sweep, tmp_path, capsys):
    results, picture = tmp_path / "results.json", tmp_path / "samplers.png"
    run("sweeps.py", sweep, "--baseline", "FlowMatchEuler 250", "--results", results)
    table = capsys.readouterr().out
    assert "| FlowMatchEuler 250 | 250 | 3.000 ± 1.414 | 1.000 ± 0.000 | 2 |" in table
    assert "| UniPC 10 | 10 | 3.450 ± 1.909 | 1.125 ± 0.106 | 2 |" in table
    run("sweeps.py", results, "--baseline", "FlowMatchEuler 250", "--picture", picture)
    assert capsys.readouterr().out == table
    assert Image.open(picture).width > 900


def test_folders_without_cells_are_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="holds no cells of a sweep"):
        run("sweeps.py", tmp_path)
