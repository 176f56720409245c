"""Signals, loader workers and launchers, in real processes: nothing waits for ever, and no step is lost or changed."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.fuzz.sigkill import ROOT, run_with_kills, running, same_weights, steps
from tests.scripts.forks import Fork
from tests.training import small_run

NUM_STEPS = 60
ACCELERATE = ["-m", "accelerate.commands.launch"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FIELDS = [f"max_train_steps={NUM_STEPS}", "checkpointing_steps=20", "seconds=0.01", "num_workers=1"]


@contextlib.contextmanager
def started(output_dir, *words, launcher=()):
    """A small run in processes of its own; whatever is left of it at the end is killed."""
    command = [small_run.__file__, str(output_dir), "ddp", *FIELDS, *words]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if launcher:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *launcher, *command]
        process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    else:
        process = Fork(*command, env=env, start_new_session=True)
    try:
        yield process
    finally:
        for left in descendants(process):
            left.kill()
        process.kill()
        process.communicate()


def descendants(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def wait_for_step(output_dir, process):
    """Wait until the run is at work, which it then is for seconds more; the log is written before checkpoints are."""
    wait_until(lambda: (output_dir / "log.jsonl").is_file() or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]


def own_lines(text):
    """What a process has written, without progress bars."""
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("Training:")]


def resumed_equals(output_dir, whole, batch=8):
    words = [f"max_train_steps={NUM_STEPS}", "resume_from_checkpoint=latest", f"train_batch_size={batch}"]
    small_run.main(str(output_dir), "ddp", *words)
    return same_weights(output_dir / f"checkpoint-{NUM_STEPS}", whole / f"checkpoint-{NUM_STEPS}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run, undisturbed."""
    output_dir = tmp_path_factory.mktemp("signals") / "whole"
    small_run.main(str(output_dir), "ddp", f"max_train_steps={NUM_STEPS}")
    return output_dir


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_unreadable_image_ends_a_run_with_workers_by_one_line(tmp_path, num_workers):
    with started(tmp_path / "out", "unreadable=7", f"num_workers={num_workers}") as process:
        _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert own_lines(err) == ["Error: Cannot read the image of row 7."]


def test_a_killed_worker_ends_the_run_by_one_line_and_resuming_gives_the_same_weights(tmp_path, whole):
    # The worker is killed at work on an image, not as it hands one over, and the run waits for it.
    with started(tmp_path / "out", "seconds=0.05") as process:
        wait_for_step(tmp_path / "out", process)
        descendants(process)[0].kill()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    (line,) = own_lines(err)
    assert line.startswith("Error: a process of the data loader ended, perhaps for lack of memory: ")
    assert resumed_equals(tmp_path / "out", whole)


def test_workers_outlive_signals_to_all_but_not_their_parent(tmp_path):
    with started(tmp_path / "out") as process:
        wait_for_step(tmp_path / "out", process)
        (worker,) = descendants(process)
        worker.send_signal(signal.SIGTERM)
        worker.send_signal(signal.SIGINT)
        wait_until(lambda: 20 in steps(tmp_path / "out"))
        assert running([worker])
        process.kill()
        wait_until(lambda: not running([worker]), seconds=10)


@pytest.mark.parametrize(
    ("number", "to", "said"),
    [
        (signal.SIGTERM, "launcher", "Stopped by the end of its launcher after step"),
        (signal.SIGINT, "group", "Stopped by Ctrl-C after step"),
    ],
)
def test_a_run_under_accelerate_launch_ends_with_a_checkpoint(tmp_path, whole, number, to, said):
    with started(tmp_path / "out", launcher=ACCELERATE) as process:
        wait_for_step(tmp_path / "out", process)
        everyone = descendants(process)
        assert len(everyone) == 2  # the run and its worker
        (os.kill if to == "launcher" else os.killpg)(process.pid, number)
        out, _ = process.communicate(timeout=60)  # until all have closed their outputs
        wait_until(lambda: not running(everyone), seconds=10)
    assert said in out
    assert "Continue with resume_from_checkpoint latest." in out
    assert 0 < max(steps(tmp_path / "out")) < NUM_STEPS
    assert list((tmp_path / "out").glob("*.partial")) == []
    assert resumed_equals(tmp_path / "out", whole)


def test_two_processes_end_with_a_checkpoint_when_torchrun_is_told_to(tmp_path):
    with started(tmp_path / "out", "train_batch_size=4", launcher=TORCHRUN) as process:
        wait_for_step(tmp_path / "out", process)
        everyone = descendants(process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        wait_until(lambda: not running(everyone), seconds=10)
    last = max(steps(tmp_path / "out"))
    assert f"Stopped by SIGTERM after step {last}, which checkpoint-{last} holds" in out
    assert 0 < last < NUM_STEPS
    assert "small_run.py" not in err  # no traceback of ours


def test_kills_of_any_process_change_no_bit(tmp_path):
    """The short form of `python -m tests.fuzz.sigkill`."""
    assert run_with_kills(tmp_path, kills=1, processes=1, workers=1, report=lambda line: None)
