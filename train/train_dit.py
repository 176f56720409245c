"""Trains a class-conditional spatial-decay diffusion transformer and saves it as a diffusers pipeline.

    accelerate launch train/train_dit.py                                   # the digits, in minutes on a CPU
    accelerate launch train/train_dit.py --config my_run.yaml --seed 1     # a YAML file, and flags on top
    accelerate launch train/train_dit.py --resume_from_checkpoint latest   # ... with the flags of the run
    accelerate launch train/train_dit.py --dataset CACHE                   # latents of train/encode_latents.py

Without --config, the digits take train/configs/digits.yaml; another --dataset starts from what --help shows.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import set_seed

from sdt_diffusion import SDTPipeline
from sdt_diffusion.command_line import errors_in_a_line, parse_arguments, require_at_least
from sdt_diffusion.data import CorruptImageError, DataArguments
from sdt_diffusion.evaluation.label_accuracy import label_accuracy
from sdt_diffusion.files import move_into, write_atomically
from sdt_diffusion.generation import class_labels_for, generate
from sdt_diffusion.plots import image_grid, plot_loss_curve
from sdt_diffusion.sdt.arguments import ModelArguments
from sdt_diffusion.sharing import HubArguments, create_hub_repo, share_run
from sdt_diffusion.training.arguments import OptimizationArguments, RunArguments
from sdt_diffusion.training.checkpoint import CheckpointError
from sdt_diffusion.training.guard import NonFiniteLossError
from sdt_diffusion.training.objectives import DiffusionLoss, ObjectiveArguments, build_objective
from sdt_diffusion.training.run import Training
from sdt_diffusion.training_data import open_training_data

DIGITS_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


@dataclass
class ValidationArguments:
    """Samples to look at, as training goes and at its end."""

    validation_steps: int = field(default=0, metadata={"help": "Steps between sample grids; 0 for none but the last."})
    num_validation_images: int = field(default=80, metadata={"help": "Images in a grid."})
    guidance_scale: float = field(default=4.0, metadata={"help": "Classifier-free guidance of these samples."})
    num_inference_steps: int = field(default=50, metadata={"help": "Sampling steps."})
    label_accuracy_samples: int = field(
        default=0,
        metadata={"help": "At the end, how many samples to judge by a support vector machine (small data only)."},
    )

    def __post_init__(self):
        require_at_least(self, 0, "validation_steps", "label_accuracy_samples")
        require_at_least(self, 1, "num_validation_images", "num_inference_steps")


def main(argv):
    *arguments, hub_args = parse_arguments(
        (
            *(ModelArguments, DataArguments, ObjectiveArguments, OptimizationArguments, RunArguments),
            *(ValidationArguments, HubArguments),
        ),
        argv,
        recipes={"digits": DIGITS_CONFIG},
        description=__doc__,
    )
    model_args, data_args, objective_args, optimization_args, run_args, validation_args = arguments

    with errors_in_a_line(ValueError, OSError):
        data = open_training_data(data_args, model_args, run_args.seed)
        images, vae = data.images, data.vae
        if data.is_cached and validation_args.label_accuracy_samples:
            raise ValueError("--label_accuracy_samples needs the images' pixels, and not a cache of latents.")

        set_seed(run_args.seed)
        channels, side, _ = data.sample_shape
        model = model_args.build(sample_size=side, in_channels=channels, num_classes=images.num_classes)
        objective = build_objective(objective_args)
        diffusion_loss = DiffusionLoss(objective, model.config.class_dropout_prob)

        def compute_loss(model, batch, class_labels, draws):
            return diffusion_loss(model, data.clean(batch, draws), class_labels, draws)

        training = Training(
            model,
            "transformer",
            compute_loss,
            images,
            run_args,
            optimization_args,
            data_args,
            arguments,
            augment=data.augment,
            further_values=diffusion_loss.by_timestep,
            identity=data.identity,
            named_by_identity=data.named_by_identity,
        )
        if training.accelerator.is_main_process:
            create_hub_repo(hub_args, training.output_dir)  # if that cannot be, it shows now and not in the end
    if vae is not None:
        vae.to(training.accelerator.device)
    pipe = SDTPipeline(
        training.trained_model,
        objective.sampling_scheduler(pixels=vae is None),
        vae,
        id2label=dict(enumerate(images.class_names)),
    )
    sampling = {
        "seed": run_args.seed,
        "guidance_scale": validation_args.guidance_scale,
        "num_inference_steps": validation_args.num_inference_steps,
    }

    def sample_grid():
        shown = torch.linspace(0, images.num_classes - 1, min(10, images.num_classes)).long().tolist()
        labels = class_labels_for(validation_args.num_validation_images, shown)
        pictures = [image for _, image in generate(pipe, labels, progress=False, **sampling)]
        return image_grid(pictures, [images.class_names[label] for label in labels], columns=len(shown))

    with errors_in_a_line(CorruptImageError, CheckpointError, NonFiniteLossError):
        for step in training.steps():
            if validation_args.validation_steps and step % validation_args.validation_steps == 0:
                training.save_picture(f"samples/step-{step:07d}.png", sample_grid)
    output_dir = training.output_dir
    if training.accelerator.is_main_process:
        move_into(output_dir, pipe.save_pretrained)
        write_atomically(output_dir / "loss_curve.png", lambda path: plot_loss_curve(training.log.records, path))
    training.save_picture("samples.png", sample_grid)
    if training.accelerator.is_main_process:
        if validation_args.label_accuracy_samples:
            results = label_accuracy(pipe, images, validation_args.label_accuracy_samples, sampling)
            write_atomically(output_dir / "results.json", lambda path: path.write_text(json.dumps(results, indent=2)))
            print(
                "{label_accuracy:.1%} of {num_images} samples are taken for their label by an RBF SVM trained on the "
                "{num_real_images} real images ({sampler}).".format(**results)
            )
        print(f"Saved the pipeline, samples.png and loss_curve.png to {output_dir}")
    training.finish()
    share_run(hub_args, training, images, [m for m in (pipe.transformer, vae) if m is not None], __file__, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
