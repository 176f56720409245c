"""Trains an image classifier, SDT-H or a head on a trained SDT pipeline, and saves it for transformers' Auto classes.

    accelerate launch train/train_classifier.py                                 # the digits, in minutes on a CPU
    accelerate launch train/train_classifier.py --config train/configs/imagenet_classifier.yaml --dataset DIR
    accelerate launch train/train_classifier.py --model outputs/digits --output_dir outputs/probe  # a linear probe
    accelerate launch train/train_classifier.py --resume_from_checkpoint latest # ... with the flags of the run

Without --config, the digits take train/configs/digits_classifier.yaml; another --dataset starts from what --help
shows.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from ..data import CorruptImageError, DataArguments, LabelledImages, SeededTransform
from ..data.splits import ImageSubset, ValidationDataArguments, load_splits
from ..hub import HubArguments, command_of, create_hub_repo, describe_run, share_run
from ..metrics.confusion import PreparedImages, classify, from_log, to_log
from ..metrics.extractors.transformers_models import channels_of
from ..plots import plot_accuracy_curve
from ..sdt_h.image_processing_sdt_h import SDTHImageProcessor
from ..utils.arguments import errors_in_a_line, parse_arguments, require_at_least
from ..utils.files import move_into, write_atomically
from ..utils.seeding import Stream, seed_global_generators
from .checkpoint import CheckpointError
from .classifier_model import ClassifierModelArguments
from .config import OptimizationArguments, RunArguments
from .distributed import process_state
from .monitor import NonFiniteLossError
from .recipe import ClassificationLoss, RecipeArguments, build_processor, layer_decay_groups, train_transform
from .run import Training


def evaluate_classifier(
    model: nn.Module,
    images: LabelledImages | ImageSubset,
    processor: SDTHImageProcessor,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int = 0,
) -> dict[str, float | int | None]:
    """Measure accuracy and loss as eval/accuracy.py does, on all processes.

    Args:
        model: A classifier of transformers, in evaluation mode.
        images: Pictures and labels, which are the model's.
        processor: The image processor that is saved with the model.
        accelerator: Knows the precision.
        batch_size: Images at a time.
        num_workers: Processes that load images.

    Returns:
        `top1`, `top5` (`None` for five labels or fewer), `loss` (cross entropy) and `count`.

    Raises:
        CorruptImageError: If an image cannot be decoded; the message names it.
    """
    confusion, _ = classify(
        model,
        PreparedImages(images, processor, channels_of(model)),
        range(images.num_classes),
        batch_size,
        num_workers,
        autocast=accelerator.autocast,
        require_finite=False,  # a test must not end a run
    )
    return confusion.numbers()


CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass
class EvaluationArguments:
    """When to test."""

    validation_steps: int = field(
        default=0, metadata={"help": "Steps between tests; 0 for none but before and after training."}
    )

    def __post_init__(self):
        require_at_least(self, 0, "validation_steps")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    *arguments, hub_args = parse_arguments(
        (
            ClassifierModelArguments,
            DataArguments,
            ValidationDataArguments,
            RecipeArguments,
            OptimizationArguments,
            RunArguments,
            EvaluationArguments,
            HubArguments,
        ),
        argv,
        recipes={"digits": CONFIGS / "digits_classifier.yaml"},
        description=__doc__,
    )
    model_args, data_args, validation_args, recipe_args, optimization_args, run_args, evaluation_args = arguments

    with errors_in_a_line(ValueError, OSError):
        recipe_args.check_batch_size(run_args.train_batch_size)
        data_args.image_mode = data_args.image_mode or model_args.image_mode
        images, train_images, test_images = load_splits(data_args, validation_args, model_args.default_resolution)
        recipe_args.resolve_epochs(run_args, optimization_args, len(train_images), process_state().num_processes)

        seed_global_generators(Stream.INITIALIZATION, run_args.seed)
        model = model_args.build(images.num_channels, images.class_names)
        processor = build_processor(
            images.num_channels,
            data_args.resolution,
            recipe_args.crop_pct,
            model_args.kind != "backbone",
            model_args.processor,
        )
        training = Training(
            model,
            "classifier",
            ClassificationLoss(recipe_args, images.num_classes),
            train_images,
            run_args,
            optimization_args,
            data_args,
            arguments,
            augment=SeededTransform(train_transform(recipe_args, processor, data_args.random_flip), run_args.seed),
            num_repeats=recipe_args.aug_repeats,
            parameter_groups=layer_decay_groups(model, recipe_args, optimization_args.adam_weight_decay),
        )
        if training.accelerator.is_main_process:
            create_hub_repo(hub_args, training.output_dir)  # if that cannot be, it shows now and not in the end
    # A run that was killed between a checkpoint and its test has the test to make up for.
    tested = {record["step"] for record in training.log.records if "test_accuracy" in record}

    def test_if_due(step):
        due = step in (0, run_args.max_train_steps) or (
            evaluation_args.validation_steps and step % evaluation_args.validation_steps == 0
        )
        if due and step not in tested:
            training.gather()
            found = evaluate_classifier(
                training.trained_model,
                test_images,
                processor,
                training.accelerator,
                run_args.train_batch_size,
                data_args.dataloader_num_workers,
            )
            training.record(to_log(found))

    training.trained_model.eval()
    with errors_in_a_line(CorruptImageError, CheckpointError, NonFiniteLossError):
        test_if_due(training.step)  # at step 0 this finds images that cannot be read before hours are spent
        for step in training.steps():
            training.trained_model.eval()
            test_if_due(step)
    if training.accelerator.is_main_process:
        output_dir = training.output_dir

        def save(folder):
            training.trained_model.save_pretrained(folder)
            processor.save_pretrained(folder)

        move_into(output_dir, save)
        records = training.log.records
        write_atomically(output_dir / "accuracy_curve.png", lambda path: plot_accuracy_curve(records, path))
        tested = [record for record in records if "test_accuracy" in record][-1]
        results = {
            "kind": "classifier_training",
            "step": tested["step"],
            **from_log(tested),
            "train_images": len(train_images),
            "trained_parameters": sum(p.numel() for p in training.unwrapped_model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in training.unwrapped_model.parameters()),
        }
        write_atomically(output_dir / "results.json", lambda path: path.write_text(json.dumps(results, indent=2)))
        top5 = "" if results["top5"] is None else f", and for {results['top5']:.2%} the class is among the first five"
        print(f"{results['top1']:.2%} of {results['count']} test images are classified right{top5}.")
        print(f"Saved the classifier, results.json and accuracy_curve.png to {output_dir}")
    training.finish()
    if training.accelerator.is_main_process:
        num_processes = training.accelerator.num_processes
        record = describe_run(
            command_of("train/train_classifier.py", argv, num_processes),
            training.config,
            train_images,
            [training.trained_model],
            training.step,
            training.images_per_step,
            num_processes,
        )
        share_run(hub_args, training.output_dir, record)
