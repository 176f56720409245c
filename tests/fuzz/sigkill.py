"""Kill a run again and again, by SIGKILL to one of its processes, and compare its weights with an undisturbed run's.

    python -m tests.fuzz.sigkill --kills 30

Each time the launcher, a training process, a loader worker, or all of them are killed at a random moment after the
first new checkpoint. What is left must end by itself, and the next start goes on from the last checkpoint.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from tests.scripts.forks import Fork
from tests.training import small_run

ROOT = Path(__file__).parents[2]
#: Seconds in which what is left of a killed run must end, and in which a start must reach a checkpoint.
LIMIT = 90
#: Steps a run makes for each kill, at least: a checkpoint, and some steps until it is killed.
STEPS_PER_KILL = 12
CHECKPOINTING_STEPS = 2


def start(output_dir, num_steps, processes, workers):
    """Start or continue the run, several processes under torchrun; return the first process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    fields = {
        "train_batch_size": 8 // processes,
        "max_train_steps": num_steps,
        "checkpointing_steps": CHECKPOINTING_STEPS,
        "checkpoints_total_limit": 3,
        "num_workers": workers,
        "seconds": 0.01,
        "resume_from_checkpoint": "latest",
    }
    words = [f"{key}={value}" for key, value in fields.items()]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [small_run.__file__, str(output_dir), "ddp", *words]
    with output_dir.with_suffix(".txt").open("a") as output:
        options = {"env": environment, "stdout": output, "stderr": output}
        if processes == 1:
            return Fork(*command, **options)
        return subprocess.Popen([sys.executable, *launcher, *command], **options)


def wait_until(condition, what):
    """Wait for a condition."""
    end = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} took more than {LIMIT} s.")
        time.sleep(0.01)


def steps(output_dir):
    """Return the steps of the checkpoints in a run's folder."""
    names = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")]
    return {int(name) for name in names if name.isdigit()}


def kill_once(output_dir, num_steps, processes, workers, chance):
    """Start or continue a run and kill a part of it; return what was killed, when all of it has ended."""
    before = max(steps(output_dir), default=0)
    with start(output_dir, num_steps, processes, workers) as first:
        wait_until(lambda: max(steps(output_dir), default=0) > before or first.poll() is not None, "A checkpoint")
        assert first.poll() is None, "the run ended before it could be killed"
        time.sleep(chance.uniform(0, 0.3))
        parts = {"launcher": [psutil.Process(first.pid)]}
        parts["trainer"] = parts.pop("launcher") if processes == 1 else running(parts["launcher"][0].children())
        parts["loader"] = [child for trainer in parts["trainer"] for child in trainer.children()]
        everyone = [process for part in parts.values() for process in part]
        what = chance.choice([name for name, part in parts.items() if part] + ["all"])
        for process in everyone if what == "all" else [chance.choice(parts[what])]:
            process.kill()
        wait_until(lambda: first.poll() is not None, "The end of the first process")
        wait_until(lambda: not running(everyone), f"The end of all processes after SIGKILL to {what}")
        assert first.returncode != 0, f"the run ended well after SIGKILL to {what}"
    return what


def running(processes):
    """Return the processes that are there and no zombies."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def same_weights(folder, other):
    """Return whether two folders hold the same tensors, to the bit."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    if not names or names != sorted(path.relative_to(other) for path in other.rglob("*.safetensors")):
        return False
    for name in names:
        a, b = load_file(folder / name), load_file(other / name)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


def run_with_kills(folder, kills, processes=2, workers=1, seed=0, report=print):
    """Compare a run that is killed `kills` times with an undisturbed one.

    Returns:
        Whether weights, moments and averages are the same.
    """
    chance, num_steps = random.Random(seed), STEPS_PER_KILL * (kills + 1)
    killed, whole = folder / "killed", folder / "whole"
    for number in range(kills):
        started = time.monotonic()
        what = kill_once(killed, num_steps, processes, workers, chance)
        report(f"kill {number + 1}: {what}, checkpoints {sorted(steps(killed))}, {time.monotonic() - started:.1f} s")
    for output_dir in (killed, whole):
        with start(output_dir, num_steps, processes, workers) as first:
            assert first.wait(timeout=60 + num_steps) == 0, output_dir.with_suffix(".txt").read_text()[-2000:]
    last = f"checkpoint-{num_steps}"
    return same_weights(killed / last, whole / last) and same_weights(killed / "product", whole / "product")


def main():
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        same = run_with_kills(Path(folder), args.kills, args.processes, args.workers, args.seed)
    sys.exit(None if same else "The weights differ.")


if __name__ == "__main__":
    main()
