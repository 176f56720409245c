"""Run the commands of docs/imagenet.md as they stand there, with the small settings that it gives."""

import json
import os
import re
import shlex

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from tests.scripts.process import ROOT, call

BLOCK = re.compile(r"<!-- (small settings|commands) -->\n```bash\n(.*?)```", re.DOTALL)


def test_the_commands_of_the_page_lead_from_images_to_an_fid(tmp_path, monkeypatch):
    blocks = BLOCK.findall((ROOT / "docs" / "imagenet.md").read_text())
    assert [kind for kind, _ in blocks] == ["small settings", "commands", "commands", "commands"]
    monkeypatch.chdir(ROOT)
    output = ""
    for _, commands in blocks:
        for line in commands.replace("\\\n", " ").replace("outputs/small", str(tmp_path)).splitlines():
            words = shlex.split(os.path.expandvars(line))
            if words[0] == "export":
                for assignment in words[1:]:
                    monkeypatch.setenv(*assignment.split("=", 1))
                continue
            while not words[0].endswith(".py"):  # python, or accelerate launch with its flags
                words.pop(0)
            result = call(*words)
            assert result.returncode == 0, result.stderr
            output += result.stdout
    assert "200 images of 10 classes are in" in output
    assert "All 1 shards of" in output
    run = tmp_path / "sdt-s-2"
    pipe = DiffusionPipeline.from_pretrained(run)
    assert pipe.transformer.config.sample_size == 32
    assert pipe.vae.config.scaling_factor == 0.18215
    assert pipe.labels["n00000003"] == 3
    fid = json.loads((run / "fid.json").read_text())
    assert np.isfinite(fid["fid"])
    assert f"| FD(classifier)-20 | {fid['fid']:g} | 20 | FlowMatchEuler" in (run / "README.md").read_text()
    assert Image.open(run / "samples.png").size[0] > 256
