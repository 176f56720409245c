"""docs/imagenet.md, as it stands there, on its small settings: from a folder of images to an FID and a model card."""

import json
import os
import re
import subprocess

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from tests.scripts.process import ROOT

BLOCK = re.compile(r"<!-- (small settings|commands) -->\n```bash\n(.*?)```", re.DOTALL)


def test_the_commands_of_the_page_lead_from_images_to_an_fid(tmp_path):
    blocks = BLOCK.findall((ROOT / "docs" / "imagenet.md").read_text())
    assert [kind for kind, _ in blocks] == ["small settings", "commands", "commands", "commands"]
    script = "".join(commands for _, commands in blocks).replace("outputs/small", str(tmp_path))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "200 images of 10 classes are in" in result.stdout
    assert "All 1 shards of" in result.stdout
    run = tmp_path / "sdt-s-2"
    pipe = DiffusionPipeline.from_pretrained(run)
    assert pipe.transformer.config.sample_size == 32
    assert pipe.vae.config.scaling_factor == 0.18215
    assert pipe.labels["n00000003"] == 3
    fid = json.loads((run / "fid.json").read_text())
    assert np.isfinite(fid["fid"])
    assert f"| FD(classifier)-20 | {fid['fid']:g} | 20 | FlowMatchEuler" in (run / "README.md").read_text()
    assert Image.open(run / "samples.png").size[0] > 256
