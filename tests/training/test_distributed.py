import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sdt_diffusion.training import distributed
from sdt_diffusion.training.config import RunArguments


@pytest.mark.parametrize(
    ("device", "bf16", "told", "expected"),
    [
        ("cuda", True, None, "bf16"),
        ("cuda", True, "no", "bf16"),
        ("cuda", True, "fp16", "fp16"),
        ("cuda", False, None, "no"),
        ("cpu", True, None, "no"),
        ("mps", True, None, "no"),
    ],
)
def test_bf16_is_the_default_where_an_accelerator_has_it(monkeypatch, device, bf16, told, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if told:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    monkeypatch.setattr(distributed, "is_bf16_available", lambda: True)  # counts what CUDA would only emulate
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    monkeypatch.setattr(distributed, "process_state", lambda: SimpleNamespace(device=torch.device(device)))
    assert distributed.resolve_precision(None) == expected


@pytest.mark.parametrize(("allowed", "precision"), [(True, "high"), (False, "highest")])
def test_tf32_is_used_where_it_is_allowed(tmp_path, allowed, precision):
    assert torch.get_float32_matmul_precision() == "highest"
    try:
        arguments = {"mixed_precision": "no", "report_to": "none", "cpu_threads": 1}
        run = RunArguments(output_dir=str(tmp_path), allow_tf32=allowed, **arguments)
        distributed.build_accelerator(run)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_precision_that_is_asked_for_wins(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert distributed.resolve_precision("no") == "no"


#: Starts a process as `accelerate launch` does, with OMP_NUM_THREADS=1 unless it is set, and prints its threads.
LAUNCH = """
import os, subprocess, sys
code = "from sdt_diffusion.training.distributed import default_threads; print(default_threads())"
environment = {"OMP_NUM_THREADS": "1", **os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
print(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout)
"""


def threads_under_accelerate_launch(**environment):
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", LAUNCH]
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return int(result.stdout)


def test_omp_num_threads_is_respected_unless_accelerate_launch_has_set_it(monkeypatch):
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cores = distributed.default_threads()
    assert threads_under_accelerate_launch() == cores
    assert threads_under_accelerate_launch(OMP_NUM_THREADS="1") == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert distributed.default_threads() == 3


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("wandb", r'report_to wandb needs .*pip install "sdt_diffusion\[trackers\]"'),
        ("wb", "must be 'none' or one of"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(monkeypatch, tracker, message):
    monkeypatch.setattr("sdt_diffusion.training.config.get_available_trackers", lambda: ["tensorboard"])
    RunArguments(report_to="tensorboard")
    with pytest.raises(ValueError, match=message):
        RunArguments(report_to=tracker)


@pytest.mark.parametrize("name", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"])
def test_a_launcher_is_a_parent_that_has_set_what_it_does_not_have(monkeypatch, name):
    for other in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(other, raising=False)
    assert distributed.find_launcher() is None  # a shell, or nohup
    monkeypatch.setenv(name, "no")
    monkeypatch.setattr("psutil.Process.environ", lambda process: {"HOME": "/"})
    assert distributed.find_launcher() == os.getppid()
    monkeypatch.setattr("psutil.Process.environ", lambda process: {name: "no"})  # a shell that has exported it
    assert distributed.find_launcher() is None


def test_regional_compilation_is_refused_for_blocks_that_differ():
    with pytest.raises(ValueError, match="needs blocks that are all alike, unlike Linear's: use full"):
        distributed.compile_model(torch.nn.Linear(2, 2), "regional")
