"""Run every file of examples/ as a user does, on its own small settings."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
MAX_LINES = 40


@pytest.fixture
def run_example(monkeypatch, tmp_path, capsys):
    """Run an example in an empty folder with some arguments, and return what it prints."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *(str(argument) for argument in arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_and_says_what_it_did(run_example, name):
    assert run_example(name)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_shows_its_command(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert f"`python examples/{name}.py" in text


def test_schedulers_are_compared_on_a_given_pipeline(run_example, make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path / "own")
    run_example("sample_with_another_scheduler", tmp_path / "own")
    assert Image.open(tmp_path / "schedulers.png").width > 4 * 64
