"""Draw many samples from a pipeline, each with its own seed, on one process or on all."""

import copy
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..sdt import SDTGuidance, SDTPipeline
from ..sdt.steps import set_schedule
from ..utils.seeding import Stream, numpy_generator, torch_generator


def sample_generator(seed: int, index: int) -> torch.Generator:
    """Return the random generator of sample `index`: the same on any device, in any batch, on any process."""
    return torch_generator(Stream.SAMPLE, seed, index)


def class_labels_for(num_images: int, classes: Sequence[int]) -> list[int]:
    """Return the labels of samples 0 to num_images - 1: the classes in turn."""
    return [classes[index % len(classes)] for index in range(num_images)]


def random_class_labels(num_images: int, classes: Sequence[int], seed: int) -> list[int]:
    """Return the labels of samples 0 to num_images - 1, each drawn from the classes by its own seed."""
    draws = (numpy_generator(Stream.SAMPLE_LABEL, seed, index).integers(len(classes)) for index in range(num_images))
    return [classes[int(draw)] for draw in draws]


def stack_samples(samples: Iterable[tuple[int, np.ndarray]]) -> np.ndarray:
    """Return the images of `generate(..., output_type="np")` in one array, shape (n, height, width, channels)."""
    return np.stack([image for _, image in samples])


def count_evaluations(pipe: SDTPipeline, sampling: dict[str, Any]) -> int:
    """Return the number of network evaluations that a sample takes; see `describe_sampling`.

    Raises:
        ValueError: If the guidance has an interval that holds none of the steps.
    """
    return _plan(pipe, sampling)[0]


def describe_sampling(pipe: SDTPipeline, sampling: dict[str, Any]) -> str:
    """Describe the sampler in words: scheduler, steps, network evaluations, guidance and seed.

    Args:
        pipe: The pipeline.
        sampling: Arguments of `generate`; the pipeline's own settings apply where they are missing.
    """
    evaluations, settings, words = _plan(pipe, sampling)
    steps, guidance = settings["num_inference_steps"], settings["guidance_scale"]
    return (
        f"{type(pipe.scheduler).__name__}, {steps} steps, {evaluations} network evaluations, "
        f"guidance {guidance:g}{f' ({words})' if words else ''}, seed {sampling.get('seed', 0)}"
    )


def _plan(pipe, sampling):
    """Return the network evaluations of a run, its settings, and its guidance in words."""
    settings = pipe.sampling_settings(sampling.get("guidance_scale"), sampling.get("num_inference_steps"))
    guidance = settings["guidance_scale"]
    scheduler, guider = copy.deepcopy(pipe.scheduler), copy.copy(pipe.guider or SDTGuidance())
    set_schedule(scheduler, settings["num_inference_steps"], uniform=pipe.config.uniform_sigmas)
    timesteps, words = scheduler.timesteps.tolist(), type(guider).__name__
    guider.guidance_scale = guidance
    if isinstance(guider, SDTGuidance):
        guider.start_run(scheduler, timesteps)
        words = guider.describe()
    evaluations = 0
    for step, timestep in enumerate(timesteps):
        guider.set_state(step, len(timesteps), timestep)
        evaluations += guider.num_conditions if guidance > 1 else 1
    return evaluations, settings, words


def generate(
    pipe: SDTPipeline,
    class_labels: Sequence[int],
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    output_type: str = "pil",
    progress: bool = True,
    **call_kwargs: Any,
) -> Generator[tuple[int, Any], None, None]:
    """Yield samples one by one, computed in batches.

    Sample i gets the noise of `sample_generator(seed, i)`, initial and per step, so it does not depend on the batch
    size or on which other samples are drawn, up to the rounding of batched arithmetic.

    Args:
        pipe: The pipeline.
        class_labels: Label of each sample.
        seed: Seed of all samples.
        batch_size: Images at a time.
        indices: Index of each sample, which its noise depends on; 0, 1, ... by default.
        output_type: See `SDTPipeline`.
        progress: Whether to show a progress bar over the images.
        **call_kwargs: Further arguments of the pipeline, such as `guidance_scale` and `num_inference_steps`.

    Yields:
        The sample's index and the image.
    """
    indices = range(len(class_labels)) if indices is None else indices
    pairs = list(zip(indices, class_labels, strict=True))
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)  # show one bar over all images instead of one for each batch
    training = pipe.transformer.training
    pipe.transformer.eval()  # a model in training would drop labels
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


def share_of_process(num_images: int, batch_size: int, batches: Sequence[int] | None = None) -> list[int]:
    """Return the indices of the samples that this process makes: every n-th batch of n processes.

    A batch holds the same samples on any number of processes, so these do not change a sample, not even its rounding.

    Args:
        num_images: Number of samples of all processes.
        batch_size: Samples at a time.
        batches: Which batches to make; all by default.
    """
    state = PartialState()
    batches = range(-(-num_images // batch_size)) if batches is None else batches
    starts = [batch * batch_size for batch in batches[state.process_index :: state.num_processes]]
    return [index for start in starts for index in range(start, min(start + batch_size, num_images))]


def generate_on_all_processes(
    pipe: SDTPipeline,
    class_labels: Sequence[int],
    seed: int = 0,
    batch_size: int = 16,
    output_type: str = "pil",
    progress: bool = True,
    **call_kwargs: Any,
) -> list[Any] | None:
    """Sample one image for each label; the processes share the batches.

    Called by all processes, each with the same weights in `pipe`. The images are those of one process.

    Args:
        pipe: The pipeline.
        class_labels: Label of each sample.
        seed: Seed of all samples.
        batch_size: Images at a time on each process. Small batches share a picture of few images evenly.
        output_type: "pil" or "np"; see `SDTPipeline`.
        progress: Whether the main process shows a progress bar over its share of the images.
        **call_kwargs: Further arguments of the pipeline, such as `guidance_scale` and `num_inference_steps`.

    Returns:
        The images in the order of the labels on the main process, `None` on the others.
    """
    state = PartialState()
    indices = share_of_process(len(class_labels), batch_size)
    labels = [class_labels[index] for index in indices]
    options = {"output_type": output_type, "progress": progress and state.is_main_process, **call_kwargs}
    made = list(generate(pipe, labels, seed, batch_size, indices, **options))
    made = gather_object(made)
    return [image for _, image in sorted(made, key=lambda pair: pair[0])] if state.is_main_process else None
