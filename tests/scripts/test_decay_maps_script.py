"""eval/decay_maps.py as a user runs it."""

import re

from PIL import Image

from tests.scripts.process import call


def test_a_picture_from_the_command_line(tmp_path, make_pipe):
    make_pipe().save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--timestep", "900", "100", "--class_label", "1", "--output"]
    result = call("eval/decay_maps.py", *flags, tmp_path / "decay.png", "--num_inference_steps", "2")
    assert result.stdout.strip() == f"Written to {tmp_path / 'decay.png'}."
    assert Image.open(tmp_path / "decay.png").width > 500
    again = call("eval/decay_maps.py", *flags, tmp_path / "decay.png")
    assert again.returncode == 1
    assert re.match(r"Error: .*decay\.png exists already", again.stderr.splitlines()[-1])
