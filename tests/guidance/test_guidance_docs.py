"""Execute the examples of docs/guidance.md."""

import re
from pathlib import Path

import pytest

from sdt_diffusion.sampling.settings import SamplerArguments
from sdt_diffusion.sdt import GUIDANCE_KINDS
from sdt_diffusion.utils.arguments import parse_arguments

PAGE = (Path(__file__).parents[2] / "docs" / "guidance.md").read_text()


def test_the_examples_run(make_pipe, make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pipe(transformer=make_model(num_classes=8, num_layers=1), id2label=None).save_pretrained("outputs/small")
    names = {"pipe": make_pipe(transformer=make_model(num_classes=8), id2label=None, num_inference_steps=5)}
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 6
    for example in examples:
        exec(example, names)
        assert len(names["images"]) == 2
        names["pipe"](0)  # the last guider works too


@pytest.mark.parametrize("flags", re.findall(r"--output_dir \S+ (--guidance(?:\\\n|.)*)", PAGE))
def test_the_commands_parse(flags):
    (arguments,) = parse_arguments((SamplerArguments,), flags.replace("\\\n", "").split())
    assert arguments != SamplerArguments()


def test_the_table_has_all_kinds():
    assert [kind for kind in GUIDANCE_KINDS if f"\n| `{kind}` |" not in PAGE] == []
