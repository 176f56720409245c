"""Many samples from a pipeline, each with a seed of its own."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..sdt import SDTPipeline
from ..utils.seeding import Stream, numpy_generator, torch_generator


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random generator of sample `index`: the same on any device, in any batch, on any process."""
    return torch_generator(Stream.SAMPLE, seed, index)


def class_labels_for(num_images: int, classes: Sequence[int]) -> list[int]:
    """Labels of samples 0 to num_images - 1: the classes in turn."""
    return [classes[index % len(classes)] for index in range(num_images)]


def random_class_labels(num_images: int, classes: Sequence[int], seed: int) -> list[int]:
    """Labels of samples 0 to num_images - 1, each drawn from the classes by its own seed."""
    draws = (numpy_generator(Stream.SAMPLE_LABEL, seed, index).integers(len(classes)) for index in range(num_images))
    return [classes[draw] for draw in draws]


def stack_samples(samples: Iterable[tuple[int, np.ndarray]]) -> np.ndarray:
    """The images of `generate(..., output_type="np")` in one array, shape (n, height, width, channels)."""
    return np.stack([image for _, image in samples])


def describe_sampling(pipe: SDTPipeline, sampling: dict[str, Any]) -> str:
    """The sampler in words, as it belongs beside every number: scheduler, steps, NFE, guidance, seed."""
    steps, guidance = sampling["num_inference_steps"], sampling["guidance_scale"]
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    evaluations = len(scheduler.timesteps) * (2 if guidance > 1 else 1)
    return (
        f"{type(pipe.scheduler).__name__}, {steps} steps, {evaluations} network evaluations, guidance {guidance:g}, "
        f"seed {sampling['seed']}"
    )


def generate(
    pipe: SDTPipeline,
    class_labels: Sequence[int],
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    output_type: str = "pil",
    progress: bool = True,
    **call_kwargs: Any,
) -> Iterator[tuple[int, Any]]:
    """Samples image after image, batch by batch.

    Sample i gets the noise of `sample_generator(seed, i)`, initial and per step, so it does not depend on the batch
    size or on which other samples are drawn, up to the rounding of batched arithmetic.

    Args:
        pipe: The pipeline.
        class_labels: Label of each sample.
        seed: Seed of all samples.
        batch_size: Images at a time.
        indices: Numbers of the samples; 0, 1, ... by default.
        output_type: See `SDTPipeline`.
        progress: Whether to show a progress bar over the images.
        **call_kwargs: Further arguments of the pipeline.

    Yields:
        The sample's number and the image.
    """
    indices = range(len(class_labels)) if indices is None else indices
    pairs = list(zip(indices, class_labels, strict=True))
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)  # one bar over all images instead of one a batch
    training = pipe.transformer.training
    pipe.transformer.eval()  # it may be in the middle of its training, where labels are dropped
    try:
        with tqdm(total=len(pairs), desc="Sampling", unit="image", disable=not progress) as bar:
            for start in range(0, len(pairs), batch_size):
                batch = pairs[start : start + batch_size]
                images = pipe(
                    [label for _, label in batch],
                    generator=[sample_generator(seed, index) for index, _ in batch],
                    output_type=output_type,
                    return_dict=False,
                    **call_kwargs,
                )[0]
                bar.update(len(batch))
                for (index, _), image in zip(batch, images, strict=True):
                    yield index, image
    finally:
        pipe.transformer.train(training)
        pipe.set_progress_bar_config(**shown)
