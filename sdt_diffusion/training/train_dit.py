"""Train a class-conditional spatial-decay diffusion transformer and save it as a diffusers pipeline.

    accelerate launch train/train_dit.py                                   # the digits, in minutes on a CPU
    accelerate launch train/train_dit.py --config my_run.yaml --seed 1     # a YAML file, and flags on top
    accelerate launch train/train_dit.py --resume_from_checkpoint latest   # ... with the flags of the run
    accelerate launch train/train_dit.py --dataset CACHE                   # latents of train/encode_latents.py
    accelerate launch train/train_dit.py --init_from outputs/digits --output_dir outputs/more  # from trained weights

Without --config, the digits use the recipe `digits`; other data sets start from the defaults shown here. One process
needs no launcher: `python train/train_dit.py`, or `python -m sdt_diffusion.training.train_dit`, is itself what SIGTERM
and Ctrl-C reach, and it ends with a checkpoint.
"""

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data import DataArguments, LabeledImages
from ..data.latents.training_data import TrainingData, open_training_data
from ..data.patch_features import EncoderArguments
from ..data.splits import take_samples
from ..evaluation.cost import count_cost
from ..evaluation.label_accuracy import label_accuracy
from ..hub import HubArguments, create_hub_repo
from ..sampling.generate import describe_sampling
from ..sampling.settings import SamplerArguments, set_attention_backend
from ..sdt import SDTPipeline, SDTTransformer2DModel
from ..utils.arguments import exit_on_error, given_arguments, json_object, one_line, parse_arguments
from ..utils.files import move_into, write_json
from ..utils.seeding import Stream, seed_global_generators
from .config import RunArguments, TrainingConfig, TrainingSet
from .distributed import autocast_forward, resolve_precision
from .ema import EMAArguments
from .heads import AverageTeacher
from .init_from import describe_classes, describe_objective, keep_shift
from .loop import train
from .model_arguments import ModelArguments
from .objectives import (
    OBJECTIVES,
    DiffusionLoss,
    MeanFlowObjective,
    ObjectiveArguments,
    TokenRouting,
    build_auxiliary_losses,
    build_objective,
    build_routing,
)
from .optimizer import OptimizationArguments
from .run import TrainingRun
from .validation import DiffusionValidation, ValidationArguments


def check_sampler(pipe: SDTPipeline, sampling: dict[str, Any]) -> None:
    """Refuse settings that the scheduler cannot sample with.

    Raises:
        ValueError: Names the settings.
    """
    try:
        describe_sampling(pipe, sampling)
    except Exception as error:  # every scheduler of diffusers raises its own
        raise ValueError(
            f"num_inference_steps {sampling['num_inference_steps']} does not fit {type(pipe.scheduler).__name__}: "
            f"{one_line(error)}"
        ) from error


def flops_of(model: SDTTransformer2DModel, routing: TokenRouting | None = None) -> float:
    """Count the floating-point operations of one image's forward pass in training, without running it."""
    config = model.config
    sides = [config.sample_size] * 2 if isinstance(config.sample_size, int) else config.sample_size
    inputs = (torch.empty(1, config.in_channels, *sides), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    options = {} if routing is None else {"route": routing.example("meta")}
    return 2 * count_cost(copy.deepcopy(model).to("meta"), *(x.to("meta") for x in inputs), **options).multiply_adds


#: What the script's command line sets.
ARGUMENT_TYPES = (
    *(ModelArguments, DataArguments, ObjectiveArguments, OptimizationArguments, EMAArguments, RunArguments),
    *(ValidationArguments, SamplerArguments, EncoderArguments, HubArguments),
)


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    *parsed, hub_args = parse_arguments(
        ARGUMENT_TYPES,
        argv,
        recipes={"digits": Path(__file__).parents[1] / "configs" / "digits.yaml"},
        description=__doc__,
    )
    model_args, data_args, objective_args, optimization_args, ema_args, run_args, *others = parsed
    validation_args, sampler_args, encoder_args = others

    run_args = replace(run_args, mixed_precision=resolve_precision(run_args.mixed_precision))
    sampler_args = sampler_args.with_defaults(**OBJECTIVES[objective_args.objective].sampling)
    vae_name = model_args.pretrained_vae_model_name_or_path
    data = open_training_data(data_args, vae_name, model_args.config()["sample_size"], run_args.seed, encoder_args)
    data_args = data.arguments
    model_args = replace(model_args, pretrained_vae_model_name_or_path=data.vae_name)
    validation_args.check_label_accuracy(data)
    train_images, held_out = validation_args.hold_out(data)
    train_images = take_samples(train_images, data_args.max_train_samples, run_args.seed)

    seed_global_generators(Stream.INITIALIZATION, run_args.seed)
    channels, side, _ = data.sample_shape
    start = model_args.init_from
    options = json_object(sampler_args.scheduler_options, "scheduler_options")
    names_shift = objective_args.time_shift != ObjectiveArguments.time_shift or {"shift", "flow_shift"} & set(options)
    objective_args = objective_args.resolved(math.prod(data.sample_shape))
    sizes = {"sample_size": side, "in_channels": channels, "num_classes": data.images.num_classes}
    objective = build_objective(objective_args)
    sizes |= {"interval_conditioning": False, **objective.model_config(channels)}
    model = model_args.build(data.images.class_names, **sizes)
    set_attention_backend(model, sampler_args.attention_backend, sampler_args.attention_prune_eps)
    if isinstance(objective, MeanFlowObjective):
        objective.check_model(model)
    auxiliary = build_auxiliary_losses(objective_args, model, run_args.train_batch_size, ema_args.use_ema, data)
    routing = build_routing(objective_args, model, auxiliary)
    loss = DiffusionLoss(objective, model.config.class_dropout_prob, data.clean, auxiliary=auxiliary, routing=routing)
    config = TrainingConfig(
        run_args,
        optimization_args,
        ema_args,
        validation_args.validation_steps,
        arguments=(
            *(model_args, data_args, objective_args, optimization_args, ema_args, run_args),
            *(validation_args, sampler_args, encoder_args),
        ),
        flops_per_image=flops_of(model, routing),
    )
    training_set = TrainingSet(
        train_images,
        data.augment,
        class_balanced=data_args.class_balanced,
        num_workers=data_args.dataloader_num_workers,
        identity=data.identity,
        relocatable=data.relocatable_arguments,
    )
    scheduler, shift_line = objective.sampling_scheduler(pixels=data.vae is None), ""
    if start is not None and not names_shift:
        scheduler, shift_line = keep_shift(scheduler, start)
    with TrainingRun(model, "transformer", training_set, config, heads=loss.heads) as run:
        loss.teacher = AverageTeacher(run)
        pipe = SDTPipeline(
            run.trained_model,
            scheduler,
            data.vae,
            id2label=dict(enumerate(data.images.class_names)),
            guidance_scale=sampler_args.guidance_scale,
            num_inference_steps=sampler_args.num_inference_steps,
            uniform_sigmas=True,
        )
        sampler_args.apply_to(pipe)
        sampling = {"seed": run_args.seed, **sampler_args.settings(pipe)}
        check_sampler(pipe, sampling)
        if run.accelerator.is_main_process:
            if start is not None:
                classes = describe_classes(start, data.images.class_names, model_args.new_classes)
                for line in filter(None, (describe_objective(start, pipe.objective), shift_line, classes)):
                    print(line)
            create_hub_repo(hub_args, run.output_dir)  # so that errors show now rather than after training
        if data.vae is not None:
            data.vae.to(run.accelerator.device)
        if data.encoder is not None:
            autocast_forward(run.accelerator, data.encoder.to(run.accelerator.device))
        validate = DiffusionValidation(
            *(pipe, loss, data, held_out, validation_args.num_validation_images, sampling),
            *(validation_args.velocity_error_images, validation_args.gate_statistics),
        )
        train(run, loss, validate)

        if run.accelerator.is_main_process:
            save_pipeline(run, pipe, data, validation_args.label_accuracy_samples, sampling)
        run.finish()
        networks = [network for network in (pipe.transformer, data.vae) if network is not None]
        run.share(hub_args, "train/train_dit.py", given_arguments(ARGUMENT_TYPES, argv), networks)


def save_pipeline(
    run: TrainingRun, pipe: SDTPipeline, data: TrainingData, label_accuracy_samples: int, sampling: dict[str, Any]
) -> None:
    """Save the pipeline and, if asked for, how many of its samples show their class."""
    move_into(run.output_dir, pipe.save_pretrained)
    if label_accuracy_samples:
        assert isinstance(data.images, LabeledImages)  # a cache was refused before training
        results = label_accuracy(pipe, data.images, label_accuracy_samples, sampling)
        write_json(run.output_dir / "results.json", results)
        print(
            "{label_accuracy:.1%} of {num_images} samples are classified as their label by an RBF SVM trained on "
            "the {num_real_images} real images ({sampler}).".format(**results)
        )
    pictures = ", samples.png and loss_curve.png" if (run.output_dir / "samples.png").is_file() else ""
    print(f"Saved the pipeline{pictures} to {run.output_dir}")


if __name__ == "__main__":
    main()
