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
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed

from sdt_diffusion.classification.arguments import ClassifierModelArguments
from sdt_diffusion.classification.evaluation import evaluate_classifier
from sdt_diffusion.classification.recipe import (
    ClassificationLoss,
    RecipeArguments,
    build_processor,
    layer_decay_groups,
    train_transform,
)
from sdt_diffusion.command_line import errors_in_a_line, parse_arguments, require_at_least
from sdt_diffusion.data import CorruptImageError, DataArguments, SeededTransform
from sdt_diffusion.data.splits import ValidationDataArguments, load_splits
from sdt_diffusion.files import move_into, write_atomically
from sdt_diffusion.plots import plot_accuracy_curve
from sdt_diffusion.sharing import HubArguments, create_hub_repo, share_run
from sdt_diffusion.training.arguments import OptimizationArguments, RunArguments
from sdt_diffusion.training.checkpoint import CheckpointError
from sdt_diffusion.training.guard import NonFiniteLossError
from sdt_diffusion.training.launch import process_state
from sdt_diffusion.training.run import Training

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class EvaluationArguments:
    """When to test."""

    validation_steps: int = field(
        default=0, metadata={"help": "Steps between tests; 0 for none but before and after training."}
    )

    def __post_init__(self):
        require_at_least(self, 0, "validation_steps")


def main(argv):
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

        set_seed(run_args.seed)
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
            training.record(found)

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
        results = {
            **[record for record in records if "test_accuracy" in record][-1],
            "train_images": len(train_images),
            "trained_parameters": sum(p.numel() for p in training.unwrapped_model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in training.unwrapped_model.parameters()),
        }
        write_atomically(output_dir / "results.json", lambda path: path.write_text(json.dumps(results, indent=2)))
        print(
            "{test_accuracy:.2%} of {test_images} test images are classified right, and for {test_accuracy_top5:.2%} "
            "the class is among the first five.".format(**results)
        )
        print(f"Saved the classifier, results.json and accuracy_curve.png to {output_dir}")
    training.finish()
    share_run(hub_args, training, train_images, [training.trained_model], __file__, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
