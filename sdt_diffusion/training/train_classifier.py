"""Train an image classifier, SDT-H or a head on a trained SDT pipeline, and save it for transformers' Auto classes.

    accelerate launch train/train_classifier.py                                 # the digits, in minutes on a CPU
    accelerate launch train/train_classifier.py --config train/configs/imagenet_classifier.yaml --dataset DIR
    accelerate launch train/train_classifier.py --model outputs/digits --output_dir outputs/probe  # a linear probe
    accelerate launch train/train_classifier.py --resume_from_checkpoint latest # ... with the flags of the run

Without --config, the digits take train/configs/digits_classifier.yaml; another --dataset starts from what --help
shows. One process needs no launcher: `python train/train_classifier.py` is itself what SIGTERM and Ctrl-C reach, and
it ends with a checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from ..data import DataArguments, LabeledImages, SeededTransform
from ..data.splits import ImageSubset, ValidationDataArguments, load_splits, take_samples
from ..hub import HubArguments, create_hub_repo
from ..metrics.confusion import PreparedImages, classify, from_log, to_log
from ..metrics.extractors.transformers_models import channels_of
from ..plots import plot_accuracy_curve
from ..sdt_h.modeling_sdt_h import SDTHImageProcessor
from ..utils.arguments import exit_on_error, given_arguments, parse_arguments
from ..utils.files import move_into, write_atomically, write_json
from ..utils.ranges import CheckedArguments, at_least
from ..utils.seeding import Stream, seed_global_generators
from .classifier_model import ClassifierModelArguments
from .config import RunArguments, TrainingConfig, TrainingSet
from .distributed import process_state, resolve_precision
from .ema import EMAArguments
from .loop import train
from .optimizer import OptimizationArguments
from .recipe import ClassificationLoss, RecipeArguments, build_processor, layer_decay_groups, train_transform
from .run import TrainingRun


def evaluate_classifier(
    model: nn.Module,
    images: LabeledImages | ImageSubset,
    processor: SDTHImageProcessor,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int = 0,
) -> dict[str, float | int | None]:
    """Measure accuracy and loss as eval/accuracy.py does, on all processes.

    Args:
        model: A classifier of transformers, in evaluation mode.
        images: Pictures with the model's labels.
        processor: The image processor that is saved with the model.
        accelerator: Provides the precision.
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


@dataclass(frozen=True)
class EvaluationArguments(CheckedArguments):
    """When to test."""

    validation_steps: int = field(
        default=0,
        metadata={"help": "Steps between tests; 0 for none but before and after training.", "resumable": True}
        | at_least(0),
    )


#: What the script's command line sets.
ARGUMENT_TYPES = (
    *(ClassifierModelArguments, DataArguments, ValidationDataArguments, RecipeArguments),
    *(OptimizationArguments, EMAArguments, RunArguments, EvaluationArguments, HubArguments),
)


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    *parsed, hub_args = parse_arguments(
        ARGUMENT_TYPES,
        argv,
        recipes={"digits": CONFIGS / "digits_classifier.yaml"},
        description=__doc__,
    )
    model_args, data_args, validation_args, recipe_args, optimization_args, ema_args, run_args, evaluation_args = (
        parsed
    )

    recipe_args.check_batch_size(run_args.train_batch_size)
    run_args = replace(run_args, mixed_precision=resolve_precision(run_args.mixed_precision))
    data_args = replace(data_args, image_mode=data_args.image_mode or model_args.image_mode)
    data_args = data_args.resolved(model_args.default_resolution)
    images, train_images, test_images = load_splits(data_args, validation_args, model_args.default_resolution)
    train_images = take_samples(train_images, data_args.max_train_samples, run_args.seed)
    run_args, optimization_args = recipe_args.resolve_epochs(
        run_args, optimization_args, len(train_images), process_state().num_processes
    )

    seed_global_generators(Stream.INITIALIZATION, run_args.seed)
    model = model_args.build(images.num_channels, images.class_names, data_args.size_and_mode[0])
    processor = build_processor(
        images.num_channels,
        data_args.resolution,
        recipe_args.crop_pct,
        model_args.kind not in ("backbone", "transformer"),
        model_args.processor,
    )
    transform = train_transform(recipe_args, processor, data_args.random_flip)
    training_set = TrainingSet(
        train_images,
        SeededTransform(transform, run_args.seed),
        recipe_args.aug_repeats,
        data_args.class_balanced,
        data_args.dataloader_num_workers,
    )
    config = TrainingConfig(
        run_args,
        optimization_args,
        ema_args,
        evaluation_args.validation_steps,
        validate_first=True,  # finds unreadable images before training starts
        arguments=(
            *(model_args, data_args, validation_args, recipe_args),
            *(optimization_args, ema_args, run_args, evaluation_args),
        ),
    )
    groups = layer_decay_groups(model, recipe_args, optimization_args.adam_weight_decay)

    def test(run):
        numbers = evaluate_classifier(
            run.trained_model,
            test_images,
            processor,
            run.accelerator,
            run_args.train_batch_size,
            data_args.dataloader_num_workers,
        )
        return to_log(numbers)

    with TrainingRun(model, "classifier", training_set, config, groups) as run:
        if run.accelerator.is_main_process:
            create_hub_repo(hub_args, run.output_dir)  # so that errors show now rather than after training
        train(run, ClassificationLoss(recipe_args, images.num_classes), test)
        if run.accelerator.is_main_process:
            save_classifier(run, processor, len(train_images))
        run.finish()
        given = given_arguments(ARGUMENT_TYPES, argv)
        run.share(hub_args, "train/train_classifier.py", given, [run.trained_model])


def save_classifier(run: TrainingRun, processor: SDTHImageProcessor, num_train_images: int) -> None:
    """Save the classifier with its processor, the results of the last test, and the accuracy curve."""

    def save(folder):
        run.trained_model.save_pretrained(folder)
        processor.save_pretrained(folder)

    move_into(run.output_dir, save)
    records = run.log.records
    write_atomically(run.output_dir / "accuracy_curve.png", lambda path: plot_accuracy_curve(records, path))
    parameters = list(run.unwrapped_model.parameters())
    last_test = [record for record in records if from_log(record)][-1]
    results = {
        "kind": "classifier_training",
        "step": last_test["step"],
        **from_log(last_test),
        "train_images": num_train_images,
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
    }
    write_json(run.output_dir / "results.json", results)
    top5 = "" if results["top5"] is None else f", and for {results['top5']:.2%} the class is among the first five"
    print(f"{results['top1']:.2%} of {results['count']} test images are classified right{top5}.")
    print(f"Saved the classifier, results.json and accuracy_curve.png to {run.output_dir}")


if __name__ == "__main__":
    main()
