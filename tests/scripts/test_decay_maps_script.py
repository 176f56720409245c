"""eval/decay_maps.py as a user runs it."""

import runpy
import sys

import pytest
from PIL import Image

from tests.scripts.process import ROOT, run


def test_a_picture_from_the_command_line(tmp_path, make_pipe):
    make_pipe().save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--timestep", "900", "100", "--class_label", "1", "--output"]
    result = run(sys.executable, "eval/decay_maps.py", *flags, tmp_path / "decay.png", "--num_inference_steps", "2")
    assert result.stdout.strip() == f"Written to {tmp_path / 'decay.png'}."
    assert Image.open(tmp_path / "decay.png").width > 500
    main = runpy.run_path(str(ROOT / "eval" / "decay_maps.py"))["main"]
    with pytest.raises(SystemExit, match=r"^Error: .*decay\.png exists already"):
        main(list(map(str, [*flags, tmp_path / "decay.png"])))
