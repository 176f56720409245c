"""Trains a class-conditional spatial-decay diffusion transformer and saves it as a diffusers pipeline.

    accelerate launch train/train_dit.py                                   # the digits, in minutes on a CPU
    accelerate launch train/train_dit.py --config my_run.yaml --seed 1     # a YAML file, and flags on top
    accelerate launch train/train_dit.py --resume_from_checkpoint latest   # ... with the flags of the run

Without --config and --dataset it takes train/configs/digits.yaml; with a data set of yours the defaults are DiT's.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import AutoModel

from sdt_diffusion import SDTPipeline
from sdt_diffusion.data import DataArguments, load_images
from sdt_diffusion.generation import class_labels_for, describe_sampling, generate, stack_samples
from sdt_diffusion.metrics.label_accuracy import svm_label_accuracy
from sdt_diffusion.plots import image_grid, plot_loss_curve
from sdt_diffusion.sdt.arguments import ModelArguments
from sdt_diffusion.sdt.latents import encode_pixels, vae_spatial_scale
from sdt_diffusion.training.arguments import OptimizationArguments, RunArguments, merged, parse_arguments
from sdt_diffusion.training.checkpoint import move_into, write_atomically
from sdt_diffusion.training.objectives import ObjectiveArguments, build_objective, diffusion_loss
from sdt_diffusion.training.run import Training

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


def main(argv):
    arguments = parse_arguments(
        (ModelArguments, DataArguments, ObjectiveArguments, OptimizationArguments, RunArguments, ValidationArguments),
        argv,
        default_config=DIGITS_CONFIG,
        default_config_unless="--dataset",
        description=__doc__,
    )
    model_args, data_args, objective_args, optimization_args, run_args, validation_args = arguments

    vae = None
    if model_args.pretrained_vae_model_name_or_path is not None:
        vae = AutoModel.from_pretrained(model_args.pretrained_vae_model_name_or_path).eval().requires_grad_(False)
    scale = vae_spatial_scale(vae)
    resolution = data_args.resolution or model_args.config()["sample_size"] * scale
    if resolution % scale:
        raise ValueError(f"--resolution {resolution} is not divisible by the VAE's factor {scale}.")
    images = load_images(data_args, resolution)

    set_seed(run_args.seed)
    model = model_args.build(
        sample_size=resolution // scale,
        in_channels=images.num_channels if vae is None else vae.config.latent_channels,
        num_classes=images.num_classes,
    )
    objective = build_objective(objective_args)

    def compute_loss(model, pixels, class_labels):
        clean = pixels if vae is None else encode_pixels(vae, pixels)
        return diffusion_loss(model, objective, clean, class_labels)

    training = Training(
        model, "transformer", compute_loss, images, run_args, optimization_args, data_args, merged(*arguments)
    )
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

    for step in training.steps():
        if validation_args.validation_steps and step % validation_args.validation_steps == 0:
            training.save_picture(f"samples/step-{step:07d}.png", sample_grid)
    training.save_picture("samples.png", sample_grid)
    if training.accelerator.is_main_process:
        output_dir = training.output_dir
        move_into(output_dir, pipe.save_pretrained)
        write_atomically(output_dir / "loss_curve.png", lambda path: plot_loss_curve(training.log.records, path))
        if validation_args.label_accuracy_samples:
            report_label_accuracy(pipe, images, validation_args.label_accuracy_samples, sampling, output_dir)
        print(f"Saved the pipeline, samples.png and loss_curve.png to {output_dir}")
    training.finish()


def report_label_accuracy(pipe, images, num_samples, sampling, output_dir):
    labels = class_labels_for(num_samples, range(images.num_classes))
    samples = stack_samples(generate(pipe, labels, batch_size=250, output_type="np", **sampling))
    accuracy = svm_label_accuracy(images, samples, labels)
    sampler = describe_sampling(pipe, sampling)
    results = {"label_accuracy": accuracy, "num_images": num_samples, "sampler": sampler}
    write_atomically(output_dir / "results.json", lambda path: path.write_text(json.dumps(results, indent=2)))
    print(
        f"{accuracy:.1%} of {num_samples} samples are taken for their label by an RBF SVM trained on the "
        f"{len(images)} real images ({sampler})."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
