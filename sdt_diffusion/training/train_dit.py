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
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import reduce
from PIL import Image
from torch.utils.data import DataLoader, Subset

from ..data import DataArguments, LabeledImages
from ..data.latents.training_data import TrainingData, open_training_data
from ..data.splits import ImageSubset
from ..evaluation.cost import count_cost
from ..evaluation.label_accuracy import MAX_SVM_VALUES, label_accuracy
from ..hub import HubArguments, create_hub_repo
from ..plots import image_grid, plot_loss_curve
from ..sampling.generate import class_labels_for, describe_sampling, generate_on_all_processes
from ..sampling.settings import SamplerArguments, set_attention_backend
from ..sdt import PRESETS, SDTPipeline, SDTTransformer2DModel
from ..utils.arguments import exit_on_error, given_arguments, json_object, one_line, parse_arguments
from ..utils.files import move_into, write_atomically, write_json
from ..utils.ranges import CheckedArguments, at_least, between
from ..utils.seeding import Draws, Stream, numpy_generator, seed_global_generators
from .config import RunArguments, TrainingConfig, TrainingSet
from .distributed import resolve_precision
from .ema import EMAArguments
from .init_from import STORED, adds_decay, describe_classes, load_weights, stored_config
from .loop import train
from .objectives import DiffusionLoss, ObjectiveArguments, build_objective
from .optimizer import OptimizationArguments
from .run import TrainingRun


@dataclass(frozen=True)
class ModelArguments(CheckedArguments):
    """Which model to train."""

    model: str = field(
        default="SDT-S/2",
        metadata={"help": "A preset: SDT-{S,B,L,XL}/{2,4,8} or SDT-digits; 'stored' for that of --init_from."},
    )
    spatial_decay: Literal["context", "fixed", "content", "raster", "none"] = field(
        default="context", metadata={"help": "How attention decays; 'none' is a plain DiT."}
    )
    qk_norm: Literal["rms_norm"] | None = field(default=None, metadata={"help": "Normalize queries and keys."})
    rotary: bool = field(default=False, metadata={"help": "2D rotary embedding."})
    local_position_kernel_size: int = field(
        default=0, metadata={"help": "Local position encoding; 0 for none."} | between(0, 255)
    )
    class_dropout_prob: float = field(
        default=0.1, metadata={"help": "Fraction of labels dropped, for guidance."} | between(0, 1)
    )
    model_overrides: str | None = field(
        default=None, metadata={"help": 'Further config values as JSON, such as {"num_layers": 6}.'}
    )
    init_from: str | None = field(
        default=None,
        metadata={"help": "Start from the weights of this folder: a pipeline, a transformer, or one of a checkpoint."},
    )
    new_classes: bool = field(
        default=False,
        metadata={
            "help": "The classes are not those of --init_from; what it knows of classes of equal names is kept."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations to save memory.", "resumable": True}
    )
    pretrained_vae_model_name_or_path: str | None = field(
        default=None, metadata={"help": "VAE whose latents to learn; a cache brings its own. Default: learn pixels."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, given in ((f"model {STORED}", self.model == STORED), ("new_classes", self.new_classes)):
            if given and self.init_from is None:
                raise ValueError(f"{name} needs init_from.")

    def config(self, **overrides: Any) -> dict[str, Any]:
        """Return the model's config: the preset's, these arguments' over it, and `overrides` over both.

        With model `stored`, the folder `init_from` takes the place of a preset and of arguments that say no.
        A decay that is added to a stored model without one starts as none.

        Raises:
            ValueError: If the preset or a key is unknown, or `model_overrides` is not a JSON object.
        """
        further = json_object(self.model_overrides, "model_overrides")
        derived = sorted({"in_channels", "num_classes", "sample_size"} & set(further))
        if derived:
            raise ValueError(f"model_overrides: {', '.join(derived)} follow from the data set and resolution.")
        keys = ("spatial_decay", "qk_norm", "rotary", "local_position_kernel_size", "class_dropout_prob")
        own = {key: getattr(self, key) for key in keys}
        preset, stored = self.model, {} if self.init_from is None else stored_config(self.init_from)
        if self.model == STORED:
            preset, no = next(iter(PRESETS)), ("qk_norm", "rotary", "local_position_kernel_size")
            own = {**stored, **{key: value for key, value in own.items() if value or key not in no}}
        spatial_decay = {**own, **further}["spatial_decay"]
        if adds_decay(stored, spatial_decay) and spatial_decay != "fixed":  # which has nothing to learn
            own["decay_start"] = "none"
        return SDTTransformer2DModel.preset_config(preset, **{**own, **further, **overrides})

    def build(self, class_names: Sequence[str] = (), **overrides: Any) -> SDTTransformer2DModel:
        """Build the model of `config(**overrides)`, randomly initialized or with the weights of `init_from`.

        Args:
            class_names: Names of the classes, for `new_classes`.
            **overrides: See `config`.

        Raises:
            ValueError: If the config, or the folder of `init_from`, does not make such a model.
        """
        config = self.config(**overrides)
        try:
            model = SDTTransformer2DModel(**config)
        except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError) as error:
            if self.model_overrides is None:
                raise
            raise ValueError(f"model_overrides {self.model_overrides:.99} make no model: {one_line(error)}") from error
        if self.init_from is not None:
            load_weights(model, self.init_from, self.new_classes, class_names)
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model


@dataclass(frozen=True)
class ValidationArguments(CheckedArguments):
    """What to validate during training and at its end."""

    validation_steps: int = field(
        default=0,
        metadata={"help": "Steps between validations; 0 for none but the last.", "resumable": True} | at_least(0),
    )
    num_validation_images: int = field(
        default=80, metadata={"help": "Images of a sample grid.", "resumable": True} | between(1, 10_000)
    )
    held_out_images: int = field(
        default=0,
        metadata={"help": "Images kept from training, to measure their loss with fixed noise; the same for all seeds."}
        | at_least(0),
    )
    label_accuracy_samples: int = field(
        default=0,
        metadata={
            "help": "At the end, how many samples to judge by a support vector machine (small data only).",
            "resumable": True,
        }
        | between(0, 1_000_000),
    )

    def check_label_accuracy(self, data: TrainingData) -> None:
        """Refuse, before training, data on which the support vector machine cannot judge samples after it.

        Raises:
            ValueError: Says why.
        """
        if not self.label_accuracy_samples:
            return
        if data.is_cached:
            raise ValueError("label_accuracy_samples needs the images' pixels, and not a cache of latents.")
        resolution, image_mode = data.arguments.size_and_mode
        num_values = max(len(data.images), self.label_accuracy_samples) * resolution**2 * len(image_mode)
        if num_values > MAX_SVM_VALUES:
            raise ValueError(
                f"label_accuracy_samples is for small data: {num_values:,} pixel values are more than the "
                f"{MAX_SVM_VALUES:,} that a support vector machine can take."
            )
        if len(set(data.images.labels.tolist())) < 2:
            raise ValueError("label_accuracy_samples needs images of at least two classes.")


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


class DiffusionValidation:
    """Draws a grid of samples and the loss curve, and measures the loss of held-out images.

    Args:
        pipe: The pipeline around the run's `trained_model`.
        loss: The training loss.
        data: The data; its classes label the grid.
        held_out: Images kept from training; `None` for none.
        num_images: Images of the grid.
        sampling: `seed`, `guidance_scale` and `num_inference_steps`.
    """

    def __init__(
        self,
        pipe: SDTPipeline,
        loss: DiffusionLoss,
        data: TrainingData,
        held_out: ImageSubset | None,
        num_images: int,
        sampling: dict[str, Any],
    ):
        self.pipe, self.loss, self.data, self.held_out = pipe, loss, data, held_out
        self.num_images, self.sampling = num_images, sampling

    def __call__(self, run: TrainingRun) -> dict[str, float]:
        """Validate `run.trained_model`; all processes call it."""
        values = {} if self.held_out is None else {"validation_loss": self.held_out_loss(run, self.held_out)}
        grid = self.sample_grid()
        if grid is not None:
            steps = run.config.validation_steps
            if steps and run.step % steps == 0:
                run.save_picture(f"samples/step-{run.step:07d}.png", grid)
            if run.step == run.config.run.max_train_steps:
                run.save_picture("samples.png", grid)
            records = [*run.log.records, {"step": run.step, **values}]
            write_atomically(run.output_dir / "loss_curve.png", lambda path: plot_loss_curve(records, path))
        return values

    def sample_grid(self) -> Image.Image | None:
        """Sample up to 10 classes, evenly chosen, in turn, on all processes; the main one returns the grid."""
        names = self.data.images.class_names
        classes = torch.linspace(0, len(names) - 1, min(10, len(names))).long().tolist()
        labels = class_labels_for(self.num_images, classes)
        samples = generate_on_all_processes(self.pipe, labels, **self.sampling)
        return None if samples is None else image_grid(samples, [names[label] for label in labels])

    @torch.no_grad()
    def held_out_loss(self, run: TrainingRun, images: ImageSubset) -> float:
        """Return the mean squared error on held-out images, each with its own fixed noise and timestep."""
        accelerator, size = run.accelerator, run.config.run.train_batch_size
        starts = range(0, len(images), size)[accelerator.process_index :: accelerator.num_processes]
        sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
        for start in starts:
            rows = range(start, min(start + size, len(images)))
            batch, labels = next(iter(DataLoader(Subset(images, rows), batch_size=len(rows))))  # (B, ...), (B,)
            draws = Draws(0, start, slice(0, len(rows)), len(rows), accelerator.device, Stream.VALIDATION)
            with accelerator.autocast():
                inputs = (batch.to(accelerator.device), labels.to(accelerator.device), draws)
                _, error = self.loss.errors(run.trained_model, *inputs)
            sums += torch.stack([error.double().sum(), torch.tensor(len(rows), device=error.device)])
        error, count = reduce(sums, "sum").tolist()
        return error / count


def hold_out(images: Any, count: int) -> tuple[Any, ImageSubset | None]:
    """Split a data set into the images to train on and `count` random ones, the same for all seeds.

    Raises:
        ValueError: If no image would be left to train on.
    """
    if not count:
        return images, None
    if count >= len(images):
        raise ValueError(f"held_out_images {count} leaves none of the {len(images)} images to train on.")
    order = numpy_generator(Stream.HELD_OUT_ROWS, 0).permutation(len(images))
    return ImageSubset(images, sorted(order[count:])), ImageSubset(images, sorted(order[:count]))


def flops_of(model: SDTTransformer2DModel) -> float:
    """Count the floating-point operations of one image's forward pass, without running it."""
    config = model.config
    sides = [config.sample_size] * 2 if isinstance(config.sample_size, int) else config.sample_size
    inputs = (torch.empty(1, config.in_channels, *sides), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return 2 * count_cost(copy.deepcopy(model).to("meta"), *(x.to("meta") for x in inputs)).multiply_adds


#: What the script's command line sets.
ARGUMENT_TYPES = (
    *(ModelArguments, DataArguments, ObjectiveArguments, OptimizationArguments, EMAArguments, RunArguments),
    *(ValidationArguments, SamplerArguments, HubArguments),
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
    model_args, data_args, objective_args, optimization_args, ema_args, run_args, validation_args, sampler_args = (
        parsed
    )

    run_args = replace(run_args, mixed_precision=resolve_precision(run_args.mixed_precision))
    sampler_args = sampler_args.with_defaults()
    vae_name = model_args.pretrained_vae_model_name_or_path
    data = open_training_data(data_args, vae_name, model_args.config()["sample_size"], run_args.seed)
    data_args = data.arguments
    model_args = replace(model_args, pretrained_vae_model_name_or_path=data.vae_name)
    validation_args.check_label_accuracy(data)
    train_images, held_out = hold_out(data.images, validation_args.held_out_images)

    seed_global_generators(Stream.INITIALIZATION, run_args.seed)
    channels, side, _ = data.sample_shape
    sizes = {"sample_size": side, "in_channels": channels, "num_classes": data.images.num_classes}
    objective = build_objective(objective_args)
    if objective.learn_sigma:
        sizes["out_channels"] = 2 * channels
    model = model_args.build(data.images.class_names, **sizes)
    set_attention_backend(model, sampler_args.attention_backend, sampler_args.attention_prune_eps)
    loss = DiffusionLoss(objective, model.config.class_dropout_prob, data.clean)
    config = TrainingConfig(
        run_args,
        optimization_args,
        ema_args,
        validation_args.validation_steps,
        arguments=(
            *(model_args, data_args, objective_args, optimization_args, ema_args, run_args),
            *(validation_args, sampler_args),
        ),
        flops_per_image=flops_of(model),
    )
    training_set = TrainingSet(
        train_images,
        data.augment,
        num_workers=data_args.dataloader_num_workers,
        identity=data.identity,
        relocatable=data.relocatable_arguments,
    )
    with TrainingRun(model, "transformer", training_set, config) as run:
        pipe = SDTPipeline(
            run.trained_model,
            objective.sampling_scheduler(pixels=data.vae is None),
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
            if model_args.new_classes:
                print(describe_classes(str(model_args.init_from), data.images.class_names))
            create_hub_repo(hub_args, run.output_dir)  # so that errors show now rather than after training
        if data.vae is not None:
            data.vae.to(run.accelerator.device)
        num_images = validation_args.num_validation_images
        train(run, loss, DiffusionValidation(pipe, loss, data, held_out, num_images, sampling))

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
    print(f"Saved the pipeline, samples.png and loss_curve.png to {run.output_dir}")


if __name__ == "__main__":
    main()
