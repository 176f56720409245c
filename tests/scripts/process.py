"""Run scripts in processes of their own, or in this one."""

import contextlib
import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
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


def call(script, *arguments):
    """Run a script in this process, in seconds less; return the finished process as `run` does."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    threads, out, err, code = torch.get_num_threads(), io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            load_main(script)([str(word) for word in arguments])
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):  # as Python ends a process that says why it exits
            err.write(f"{code}\n")
            code = 1
    finally:
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess([script, *arguments], code or 0, out.getvalue(), err.getvalue())
