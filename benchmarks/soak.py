"""A training run that is killed again and again, against one that is not: are the weights the same, bit for bit?

    python benchmarks/soak.py --kills 30

Kills train/train_dit.py (a small model on the digits, a checkpoint every few steps) by SIGKILL at random moments, from
its first import on, and starts it again with --resume_from_checkpoint latest. Exits with 1 if a byte of the last
checkpoint or of the pipeline differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
STEPS = 1000
RUN = [
    *(sys.executable, "train/train_dit.py", "--cpu_threads", "1", "--model_overrides", '{"num_layers": 2}'),
    *("--max_train_steps", str(STEPS), "--checkpointing_steps", "10", "--checkpoints_total_limit", "2"),
    *("--validation_steps", "0", "--num_validation_images", "10", "--num_inference_steps", "2"),
    *("--label_accuracy_samples", "0", "--logging_steps", "5", "--train_batch_size", "32"),
    *("--ema_profile", "power", "--ema_snapshot_steps", "100", "--resume_from_checkpoint", "latest"),
]


def start(output_dir):
    return subprocess.Popen(
        [*RUN, "--output_dir", str(output_dir)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def checkpoints(output_dir):
    """Names of whole checkpoints, and of those being written or deleted."""
    return {path.name for path in output_dir.glob("checkpoint-*")}


def last_step(output_dir):
    steps = [name.removeprefix("checkpoint-") for name in checkpoints(output_dir)]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def kill_at_random(output_dir, longest_life):
    """Starts the run, kills it, and says where it was.

    One in five dies at any time from its start on, the others within `longest_life` seconds of the first sign of a
    checkpoint: starting takes so long that few would get any further. What has no steps left, but its pipeline and its
    samples to make, dies at any time.
    """
    before = checkpoints(output_dir)
    finishing = last_step(output_dir) == STEPS
    process = start(output_dir)
    since = time.monotonic()
    patience = random.uniform(0, 10) if finishing or random.random() < 0.2 else 600
    while checkpoints(output_dir) == before and process.poll() is None and time.monotonic() - since < patience:
        time.sleep(0.001)
    if checkpoints(output_dir) != before:
        time.sleep(random.uniform(0, longest_life))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if process.returncode != -signal.SIGKILL:
        if process.returncode:
            raise RuntimeError(f"the run ended by itself, with {process.returncode}")
        return "too late"
    if finishing:
        return "after the last step"
    after = checkpoints(output_dir)
    if any(name.endswith(".partial") for name in after - before):
        return "while a checkpoint was written or deleted"
    return "between checkpoints" if after != before else "before the first checkpoint of their life"


def files(output_dir):
    folders = [f"checkpoint-{STEPS}", "transformer", "scheduler", "ema_snapshots"]
    paths = [path for folder in folders for path in (output_dir / folder).rglob("*") if path.is_file()]
    paths = [path for path in paths if path.name != "checkpoint.json"]  # names the folder
    return {path.relative_to(output_dir): path.read_bytes() for path in (*paths, output_dir / "samples.png")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = Path(folder) / "undisturbed", Path(folder) / "killed"
        if start(undisturbed).wait():
            raise RuntimeError("the undisturbed run failed")
        moments = Counter()
        progress = tqdm(range(args.kills), desc="Killing", unit="kill")
        for _ in progress:
            moments[kill_at_random(killed, longest_life=2.0)] += 1
            progress.set_postfix_str(f"step {last_step(killed)} of {STEPS}")
        reached = last_step(killed)
        if start(killed).wait():
            raise RuntimeError("the killed run did not come to its end")
        expected, found = files(undisturbed), files(killed)
        differing = [str(name) for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
        leftovers = [str(path) for path in killed.rglob("*partial*")]
    where = ", ".join(f"{count} {moment}" for moment, count in moments.items())
    print(f"{args.kills} kills ({where}), the last after step {reached} of {STEPS}.")
    print(f"{len(expected)} files compared, {len(differing)} differ; {len(leftovers)} left over.")
    if differing or leftovers:
        sys.exit("\n".join([*differing, *leftovers]))


if __name__ == "__main__":
    main()
