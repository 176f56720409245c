"""How long checkpoints keep training waiting, on the digits at their default interval.

    python benchmarks/checkpointing.py --checkpoints 5

Trains as train/train_dit.py does by default, without sampling, and takes the time of every checkpoint and of the steps
between them, in the same run. Printed are medians, and the share of the pauses in all.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sdt_diffusion.data import DataArguments
from sdt_diffusion.data.latents.training_data import open_training_data
from sdt_diffusion.training.config import OptimizationArguments, RunArguments
from sdt_diffusion.training.objectives import DiffusionLoss, ObjectiveArguments, build_objective
from sdt_diffusion.training.run import Training
from sdt_diffusion.training.train_dit import ModelArguments
from sdt_diffusion.utils.arguments import parse_arguments

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from train_dit import DIGITS_CONFIG, ValidationArguments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=5)
    count = parser.parse_args().checkpoints
    with tempfile.TemporaryDirectory() as folder:
        arguments = parse_arguments(
            (
                *(ModelArguments, DataArguments, ObjectiveArguments, OptimizationArguments, RunArguments),
                ValidationArguments,
            ),
            ["--output_dir", folder],
            recipes={"digits": DIGITS_CONFIG},
        )
        model_args, data_args, objective_args, optimization_args, run_args, _ = arguments
        run_args.max_train_steps = count * run_args.checkpointing_steps
        data = open_training_data(data_args, None, model_args.config()["sample_size"], run_args.seed)
        channels, side, _ = data.sample_shape
        model = model_args.build(sample_size=side, in_channels=channels, num_classes=data.images.num_classes)
        loss = DiffusionLoss(build_objective(objective_args), model.config.class_dropout_prob)
        training = Training(
            *(model, "transformer", loss, data.images, run_args, optimization_args, data_args, arguments),
            further_values=loss.by_timestep,
        )
        pauses, intervals, save = [], [], training.save_checkpoint
        since = time.perf_counter()

        def timed_save():
            nonlocal since
            start = time.perf_counter()
            save()
            end = time.perf_counter()
            intervals.append(start - since)
            pauses.append(end - start)
            since = end

        training.save_checkpoint = timed_save
        for _ in training.steps():
            pass
        size = sum(path.stat().st_size for path in training.output_dir.rglob(f"checkpoint-{training.step}/**/*.*"))
        training.finish()
    pause, interval = statistics.median(pauses), statistics.median(intervals)
    print(f"{count} checkpoints of {size / 1e6:.1f} MB, one every {run_args.checkpointing_steps} steps (medians):")
    print(f"{pause * 1e3:.0f} ms after {interval:.1f} s of steps; {sum(pauses) / (sum(pauses) + sum(intervals)):.2%}")


if __name__ == "__main__":
    main()
