"""Run scripts in processes of their own, or in this one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def run(*command, check=True):
    """Run a command in the root of the checkout; return the finished process, with its output as text."""
    result = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or result.returncode == 0, result.stderr
    return result


def assert_same_weights(a, b):
    """Compare, bit by bit, the weights that `save_pretrained` wrote to two folders."""
    (a,), (b,) = (list(folder.glob("*.safetensors")) for folder in (a, b))
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def load_main(script):
    """Return a script's `main`, to call in this process, which is faster for what a script refuses."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.main
