"""Measure a trained model on images of other resolutions, with the scaling of positions that suits it best there."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..data.images import DataArguments
from ..data.splits import ImageSubset, ValidationDataArguments, load_splits
from ..metrics.extractors import FeatureExtractor
from ..metrics.extractors.transformers_models import load_classifier
from ..metrics.features import FeatureSummary
from ..sdt import SDTTransformer2DModel
from ..sdt.grid_scaling import POSITION_SCALINGS, WITHOUT_DISTANCE
from ..training.recipe import build_processor
from ..training.train_classifier import evaluate_classifier
from ..training.velocity_error import NUM_LEVELS, velocity_errors
from .generators import as_they_are, held_out_images, open_generator, pick_arguments
from .measures import judge_samples, rounded
from .study import Evaluation

Scaling = dict[str, Any]


def scalings_of(config: Mapping[str, Any]) -> list[Scaling]:
    """Return all ways in which a transformer can scale positions and distances; see `set_grid_scaling`."""
    choices: dict[str, Sequence[Any]] = {
        "pos_embed_scaling": POSITION_SCALINGS if config["position_embedding"] == "sincos" else ("interpolate",),
        "rotary_scaling": POSITION_SCALINGS if config["rotary"] else ("none",),
        "decay_distance_scaling": (False,) if config["spatial_decay"] in WITHOUT_DISTANCE else (False, True),
    }
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def describe_scaling(scaling: Scaling) -> str:
    """Return a scaling in words."""
    if not scaling:
        return "nothing to scale"
    words = [f"positions {scaling['pos_embed_scaling']}", f"rotary {scaling['rotary_scaling']}"]
    return ", ".join([*words, "distances scaled"] if scaling["decay_distance_scaling"] else words)


def measure_generator(
    folder: Path,
    config: Mapping[str, Any],
    evaluation: Evaluation,
    references: Mapping[str, FeatureSummary],
    extractor: FeatureExtractor | None,
    precision: str,
) -> dict[str, Any]:
    """Measure a pipeline of pixels at other resolutions.

    The first `scaling_images` of the held-out images, at a noise level each, choose the scaling.

    Args:
        folder: The pipeline.
        config: All arguments of the run that trained it.
        evaluation: Names the resolutions, and how samples are judged.
        references: Resolution -> statistics of real images; empty for no samples.
        extractor: Computes their features; `None` for no samples.
        precision: "no" or "bf16", that of training.

    Returns:
        Resolution -> `held_out_loss`, `scaling` in words, `held_out_loss_by_scaling` of the images that have chosen
        it, and what `judge_samples` returns.

    Raises:
        ValueError: If the pipeline generates latents, or the images cannot be used.
    """
    accelerator = Accelerator(mixed_precision=precision)
    pipe = open_generator(folder, accelerator.device)
    scalings = scalings_of(pipe.transformer.config)
    found = {}
    for side in evaluation.resolutions:
        images = held_out_images(config, side)

        def error(scaling: Scaling, num_images: int, num_levels: int, images: ImageSubset = images) -> float:
            pipe.transformer.set_grid_scaling(**scaling)
            measured = (pipe.scheduler, as_they_are, images, num_images, num_levels)
            return velocity_errors(pipe.transformer, *measured, accelerator).mean().item()

        few = min(evaluation.scaling_images, len(images))
        scaling, choice = _best(scalings, [error(scaling, few, 1) for scaling in scalings])
        values = {"held_out_loss": rounded(error(scaling, len(images), NUM_LEVELS)), **choice}
        if extractor is not None:
            values |= judge_samples(folder, evaluation, references[str(side)], extractor, precision, side, scaling)
        found[str(side)] = values
    return found


def measure_classifier(
    folder: Path, config: Mapping[str, Any], evaluation: Evaluation, precision: str
) -> dict[str, Any]:
    """Measure a classifier at other resolutions.

    The loss of `scaling_images` of the test images, spread over all, chooses the scaling.

    Args:
        folder: The classifier.
        config: All arguments of the run that trained it.
        evaluation: Names the resolutions.
        precision: "no" or "bf16", that of training.

    Returns:
        Resolution -> `held_out_loss`, `accuracy`, `scaling` in words, and `held_out_loss_by_scaling` of the images
        that have chosen it.

    Raises:
        ValueError: If the images cannot be used.
    """
    accelerator = Accelerator(mixed_precision=precision)
    model, trained = load_classifier(str(folder), "float32", accelerator.device)
    network = next((each for each in model.eval().modules() if isinstance(each, SDTTransformer2DModel)), None)
    scalings: list[Scaling] = [{}] if network is None else scalings_of(network.config)
    _, _, images = load_splits(
        pick_arguments(DataArguments, config),
        pick_arguments(ValidationDataArguments, config),
        trained.crop_size["height"],
    )
    step = max(1, len(images) // evaluation.scaling_images)
    some = ImageSubset(images, range(0, len(images), step)[: evaluation.scaling_images])
    found = {}
    for side in evaluation.resolutions:
        processor = build_processor(len(trained.image_mean), side, base=trained)

        def test(scaling: Scaling, images: Any, processor: Any = processor) -> dict[str, Any]:
            if network is not None:
                network.set_grid_scaling(**scaling)
            return evaluate_classifier(model, images, processor, accelerator, evaluation.batch_size)

        scaling, choice = _best(scalings, [test(scaling, some)["loss"] for scaling in scalings])
        numbers = test(scaling, images)
        values = {"held_out_loss": rounded(numbers["loss"]), "accuracy": rounded(numbers["top1"])}
        found[str(side)] = {**values, **choice}
    return found


def _best(scalings: Sequence[Scaling], losses: Sequence[float]) -> tuple[Scaling, dict[str, Any]]:
    """Return the scaling of the least loss, and what results files hold of the choice."""
    best = scalings[losses.index(min(losses))]
    by_scaling = {describe_scaling(each): rounded(loss) for each, loss in zip(scalings, losses, strict=True)}
    return best, {"scaling": describe_scaling(best), "held_out_loss_by_scaling": by_scaling}
