"""What train_dit.py validates: samples, and the loss of held-out images."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce, send_to_device
from PIL import Image
from torch.utils.data import DataLoader, Subset

from ..data.images import LabeledImages, load_images
from ..data.latents.training_data import TrainingData
from ..data.splits import ImageSubset, check_same_classes
from ..evaluation.label_accuracy import MAX_SVM_VALUES
from ..plots import image_grid, plot_loss_curve
from ..sampling.generate import class_labels_for, generate_on_all_processes
from ..sdt import SDTPipeline
from ..utils.files import write_atomically
from ..utils.ranges import CheckedArguments, at_least, between
from ..utils.seeding import Draws, Stream, numpy_generator
from .gate_statistics import GateStatistics
from .objectives import DiffusionLoss
from .run import TrainingRun
from .velocity_error import VelocityError


@dataclass(frozen=True)
class ValidationArguments(CheckedArguments):
    """What to validate during training and at its end."""

    validation_steps: int = field(
        default=0,
        metadata={"help": "Steps between validations; 0 for none but the last.", "resumable": True} | at_least(0),
    )
    num_validation_images: int = field(
        default=80,
        metadata={"help": "Images of a sample grid; 0 for no pictures.", "resumable": True} | between(0, 10_000),
    )
    held_out_images: int = field(
        default=0,
        metadata={"help": "Images kept from training, to measure their loss with fixed noise; the same for all seeds."}
        | at_least(0),
    )
    held_out_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Take the held-out images from this data set, and train on all of --dataset.",
            "resumable": True,  # the number of images to train on must still be equal
        },
    )
    velocity_error_images: int = field(
        default=0,
        metadata={
            "help": "Measure, instead of the loss, the error of the flow's velocity, which can be compared between "
            "objectives: of this many held-out images at each validation, and of all at the end.",
            "resumable": True,
        }
        | at_least(0),
    )
    gate_statistics: bool = field(
        default=False,
        metadata={
            "help": "At each validation, log how fast the attention of each head decays on held-out images, and the "
            "gradients of the gates.",
            "resumable": True,
        },
    )
    label_accuracy_samples: int = field(
        default=0,
        metadata={
            "help": "At the end, how many samples to judge by a support vector machine (small data only).",
            "resumable": True,
        }
        | between(0, 1_000_000),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.held_out_dataset is not None and not self.held_out_images:
            raise ValueError("held_out_dataset needs held_out_images: how many of its images to measure.")
        if self.gate_statistics and not self.velocity_error_images:
            raise ValueError("gate_statistics needs velocity_error_images: they are of those images.")
        if self.velocity_error_images > self.held_out_images:
            raise ValueError(
                f"velocity_error_images {self.velocity_error_images} are more than held_out_images "
                f"{self.held_out_images}, of which they are a part."
            )

    def hold_out(self, data: TrainingData) -> tuple[Any, ImageSubset | None]:
        """Return the images to train on, and those held out, if any; see `hold_out`.

        Raises:
            ValueError: If there are too few images, or `held_out_dataset` has other classes or is a cache.
        """
        if self.held_out_dataset is None:
            return hold_out(data.images, self.held_out_images)
        if not isinstance(data.images, LabeledImages):
            raise ValueError("held_out_dataset takes images, and dataset is a cache of latents: leave it out.")
        others = load_images(replace(data.arguments, dataset=self.held_out_dataset), None)
        check_same_classes(data.images, others)
        if self.held_out_images > len(others):
            raise ValueError(
                f"held_out_images {self.held_out_images} are more than the {len(others)} images of {others.name}."
            )
        return data.images, ImageSubset(others, sorted(held_out_order(len(others))[: self.held_out_images]))

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


class DiffusionValidation:
    """Draws a grid of samples and the loss curve, and measures the loss of held-out images.

    Args:
        pipe: The pipeline around the run's `trained_model`.
        loss: The training loss.
        data: The data; its classes label the grid.
        held_out: Images kept from training; `None` for none.
        num_images: Images of the grid; 0 for no pictures.
        sampling: `seed`, `guidance_scale` and `num_inference_steps`.
        velocity_error_images: Held-out images whose velocity error is measured on the way, in place of the loss of
            all; 0 to measure the loss.
        gate_statistics: Whether to describe the gates too.
    """

    def __init__(
        self,
        pipe: SDTPipeline,
        loss: DiffusionLoss,
        data: TrainingData,
        held_out: ImageSubset | None,
        num_images: int,
        sampling: dict[str, Any],
        velocity_error_images: int = 0,
        gate_statistics: bool = False,
    ):
        self.pipe, self.loss, self.data, self.held_out = pipe, loss, data, held_out
        self.num_images, self.sampling = num_images, sampling
        self.velocity_error, self.gate_statistics = None, None
        if held_out is not None and velocity_error_images:
            self.velocity_error = VelocityError(pipe.scheduler, data.clean, held_out, velocity_error_images)
            self.gate_statistics = GateStatistics(self.velocity_error) if gate_statistics else None

    def __call__(self, run: TrainingRun) -> dict[str, float]:
        """Validate `run.trained_model`; all processes call it."""
        values = {}
        if self.velocity_error is not None:
            values = self.velocity_error.on_the_way(run)
            if run.step == run.config.run.max_train_steps:
                values |= self.velocity_error.at_the_end(run)
            if self.gate_statistics is not None:
                values |= self.gate_statistics(run)
        elif self.held_out is not None:
            values = {"validation_loss": self.held_out_loss(run, self.held_out)}
        grid = self.sample_grid() if self.num_images else None
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
                batch, labels = send_to_device((batch, labels), accelerator.device)
                _, error = self.loss.errors(run.trained_model, batch, labels, draws)
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
    order = held_out_order(len(images))
    return ImageSubset(images, sorted(order[count:])), ImageSubset(images, sorted(order[:count]))


def held_out_order(num_images: int) -> np.ndarray:
    """Return the rows of a data set in the order in which they are held out, the same for all seeds."""
    return numpy_generator(Stream.HELD_OUT_ROWS, 0).permutation(num_images)
