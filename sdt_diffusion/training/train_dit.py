"""Trains a class-conditional spatial-decay diffusion transformer and saves it as a diffusers pipeline.

    accelerate launch train/train_dit.py                                   # the digits, in minutes on a CPU
    accelerate launch train/train_dit.py --config my_run.yaml --seed 1     # a YAML file, and flags on top
    accelerate launch train/train_dit.py --resume_from_checkpoint latest   # ... with the flags of the run
    accelerate launch train/train_dit.py --dataset CACHE                   # latents of train/encode_latents.py

Without --config, the digits take train/configs/digits.yaml; another --dataset starts from what --help shows.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from .. import SDTPipeline
from ..data import CorruptImageError, DataArguments
from ..data.latents.training_data import open_training_data
from ..evaluation.label_accuracy import label_accuracy
from ..hub import HubArguments, command_of, create_hub_repo, describe_run, share_run
from ..plots import image_grid, plot_loss_curve
from ..sampling.generate import class_labels_for, generate
from ..sdt.transformer_sdt import SDTTransformer2DModel
from ..utils.arguments import errors_in_a_line, json_object, parse_arguments, require_at_least
from ..utils.files import move_into, write_atomically
from ..utils.seeding import Stream, seed_global_generators
from .checkpoint import CheckpointError
from .config import OptimizationArguments, RunArguments
from .monitor import NonFiniteLossError
from .objectives import DiffusionLoss, ObjectiveArguments, build_objective
from .run import Training


@dataclass
class ModelArguments:
    """What to train."""

    model: str = field(default="SDT-S/2", metadata={"help": "A preset: SDT-{S,B,L,XL}/{2,4,8} or SDT-digits."})
    spatial_decay: Literal["context", "fixed", "content", "raster", "none"] = field(
        default="context", metadata={"help": "How attention decays; 'none' is a plain DiT."}
    )
    qk_norm: Literal["rms_norm"] | None = field(default=None, metadata={"help": "Normalise queries and keys."})
    rotary: bool = field(default=False, metadata={"help": "2D rotary embedding."})
    local_position_kernel_size: int = field(default=0, metadata={"help": "Local position encoding; 0 for none."})
    class_dropout_prob: float = field(default=0.1, metadata={"help": "Labels dropped, for guidance."})
    model_overrides: str | None = field(
        default=None, metadata={"help": 'Further config values as JSON, such as {"num_layers": 6}.'}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade speed for memory."})
    pretrained_vae_model_name_or_path: str | None = field(
        default=None, metadata={"help": "VAE to train in the latents of; a cache's own, else none: pixels."}
    )

    def config(self, **overrides) -> dict:
        """The model's config: the preset's, these arguments' over it, and `overrides` over both.

        Raises:
            ValueError: If the preset or a key is unknown, or `model_overrides` is no JSON object.
        """
        further = json_object(self.model_overrides, "--model_overrides")
        derived = sorted({"in_channels", "num_classes", "sample_size"} & set(further))
        if derived:
            raise ValueError(f"--model_overrides: {', '.join(derived)} follow from the data set and --resolution.")
        keys = ("spatial_decay", "qk_norm", "rotary", "local_position_kernel_size", "class_dropout_prob")
        own = {key: getattr(self, key) for key in keys}
        return SDTTransformer2DModel.preset_config(self.model, **{**own, **further, **overrides})

    def build(self, **overrides) -> SDTTransformer2DModel:
        """The randomly initialised model of `config(**overrides)`."""
        model = SDTTransformer2DModel(**self.config(**overrides))
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model


DIGITS_CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"


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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
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
        vae_name = model_args.pretrained_vae_model_name_or_path
        data = open_training_data(data_args, vae_name, model_args.config()["sample_size"], run_args.seed)
        model_args.pretrained_vae_model_name_or_path = data.vae_name
        arguments[1] = data_args = data.arguments
        images, vae = data.images, data.vae
        if data.is_cached and validation_args.label_accuracy_samples:
            raise ValueError("--label_accuracy_samples needs the images' pixels, and not a cache of latents.")

        seed_global_generators(Stream.INITIALIZATION, run_args.seed)
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
            named_by_identity=data.relocatable_arguments,
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
    if training.accelerator.is_main_process:
        num_processes = training.accelerator.num_processes
        record = describe_run(
            command_of("train/train_dit.py", argv, num_processes),
            training.config,
            images,
            [m for m in (pipe.transformer, vae) if m is not None],
            training.step,
            training.images_per_step,
            num_processes,
        )
        share_run(hub_args, training.output_dir, record)
