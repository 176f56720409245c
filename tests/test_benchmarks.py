"""The benchmark of attention, on a grid of 16 tokens: what it measures, writes and draws."""

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
    names = ("sdpa, no decay", "blockwise", "dense")
    assert rows == [(mode, name) for mode in ("forward", "training") for name in names]
    assert [row["ratio"] for row in results["rows"] if row["attention"] == names[0]] == ["1.000", "1.000"]
    assert "| 16 | 1 | training | dense |" in capsys.readouterr().out
    run("attention.py", "--plot", output, "--picture", picture)
    assert Image.open(picture).width > 1000


def test_grids_without_a_batch_size_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("attention.py", "--sides", 4, 8, "--batch_sizes", 1)
    assert "2 sides need as many batch_sizes, not 1" in capsys.readouterr().err
