"""A short part of the harness; `python -m tests.fuzz` runs as much as one likes."""

import json

import pytest

from tests.fuzz.bases import BASES, SCRIPTS
from tests.fuzz.child import Ended
from tests.fuzz.judge import judge
from tests.scripts.process import ROOT, fork

#: The first cases are good commands, which other tests run too.
FIRST, LAST = len(BASES), len(BASES) + 14


def test_no_case_goes_wrong(tmp_path):
    command = ["-m", "tests.fuzz", "--start", str(FIRST), "--cases", str(LAST), "--seed", "2"]
    command += ["--jobs", "2", "--output", str(tmp_path)]
    result = fork(*command, check=False)
    assert (tmp_path / "cases.jsonl").is_file(), result.stderr
    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [line for line in lines if not line["good"]] == []
    assert len(lines) == LAST - FIRST
    assert result.returncode == 0


def test_every_script_is_tried():
    scripts = {
        path.relative_to(ROOT).as_posix()
        for name in ("train", "sample", "eval")
        for path in (ROOT / name).glob("*.py")
    }
    assert {base.script for base in BASES.values()} == set(SCRIPTS) == scripts


@pytest.mark.parametrize(
    ("code", "err", "outcome"),
    [
        (0, "", "ok"),
        (1, "  0%|          | 0/2 [00:00<?, ?it/s]\nError: a.json is damaged.\n", "refused"),
        (1, "Traceback (most recent call last):\nKeyError: 3\n", "traceback"),
        (1, "", "no message"),
        (1, "a\nb\nc\nd\n", "many lines"),
        (1, "x" * 1001, "long"),
        (3, "Error: three\n", "odd exit code"),
        (-11, "", "crash"),
    ],
)
def test_outcomes(code, err, outcome):
    assert judge(Ended(code, False, 1.0, "", err))[0] == outcome
    assert judge(Ended(code, True, 60.0, "", err))[0] == "hang"
