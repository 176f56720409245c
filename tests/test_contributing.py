"""Run the worked examples of CONTRIBUTING.md."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest

from sdt_diffusion.attention import BACKENDS
from sdt_diffusion.data.images import FILE_FORMATS
from sdt_diffusion.metrics.registry import METRICS
from sdt_diffusion.training.objectives import OBJECTIVES

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
MARKED = re.compile(
    r"^### \.\.\. (?P<title>.+?)$(?:(?!^##).)*?<!-- run this -->\n```python\n(?P<code>.+?)^```", re.M | re.S
)
EXAMPLES = {match["title"]: match["code"] for match in MARKED.finditer(TEXT)}


def test_every_kind_of_addition_has_an_example_that_is_run():
    assert list(EXAMPLES) == re.findall(r"^### \.\.\. (.+)$", TEXT, re.M)
    assert len(EXAMPLES) == TEXT.count("```python")


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_runs(title, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with patch.dict(BACKENDS), patch.dict(FILE_FORMATS), patch.dict(METRICS), patch.dict(OBJECTIVES):
        exec(compile(EXAMPLES[title], f"CONTRIBUTING.md, {title}", "exec"), {"__name__": "example"})
