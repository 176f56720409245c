"""How long checkpoints keep training waiting, on the digits at their default interval.

    python benchmarks/checkpointing.py --checkpoints 5

Trains as train/train_dit.py does by default, without sampling, and takes the time of every checkpoint and of the steps
between them, in the same run. Printed are medians, and the share of the pauses in all.
"""

import argparse
import statistics
import tempfile
import time
from unittest import mock

from sdt_diffusion.training import train_dit
from sdt_diffusion.training.run import TrainingRun

STEPS_BETWEEN = 250


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=5)
    count = parser.parse_args().checkpoints
    save, pauses, intervals, sizes = TrainingRun.save_checkpoint, [], [], []
    since = time.perf_counter()

    def timed_save(run):
        nonlocal since
        start = time.perf_counter()
        save(run)
        end = time.perf_counter()
        intervals.append(start - since)
        pauses.append(end - start)
        sizes.append(sum(path.stat().st_size for path in run.output_dir.rglob(f"checkpoint-{run.step}/**/*.*")))
        since = end

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(TrainingRun, "save_checkpoint", timed_save):
        steps = ["--max_train_steps", str(count * STEPS_BETWEEN), "--checkpointing_steps", str(STEPS_BETWEEN)]
        no_validation = ["--validation_steps", "0", "--label_accuracy_samples", "0"]
        train_dit.main(["--output_dir", folder, *steps, *no_validation])
    pause, interval = statistics.median(pauses), statistics.median(intervals)
    print(f"{count} checkpoints of {sizes[-1] / 1e6:.1f} MB, one every {STEPS_BETWEEN} steps (medians):")
    print(f"{pause * 1e3:.0f} ms after {interval:.1f} s of steps; {sum(pauses) / (sum(pauses) + sum(intervals)):.2%}")


if __name__ == "__main__":
    main()
