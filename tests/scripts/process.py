"""Run scripts in this process (`call`), in forks (`fork`, `fork_ranks`) or in fresh processes (`run`), 8 s slower."""

import contextlib
import importlib.util
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from tests.scripts.forks import ROOT, Fork


def run(*command, check=True):
    """Run a command in the root of the checkout; return the finished process, with its output as text."""
    result = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or result.returncode == 0, result.stderr
    return result


def fork(*words, check=True):
    """Run what would follow `python` in a fork, in seconds less; return the finished process as `run` does."""
    return _finished(Fork(*words), check)


def fork_ranks(*words, processes=2):
    """Run a script as `torchrun --nproc_per_node` does, on CPUs; return what the processes print as of one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    ranks = [Fork(*words, env={**env, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(processes)]
    try:
        results = [_finished(rank) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    out, err = ("".join(getattr(result, name) for result in results) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, 0, out, err)


def _finished(process, check=True):
    out, err = process.communicate()
    assert not check or process.returncode == 0, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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
