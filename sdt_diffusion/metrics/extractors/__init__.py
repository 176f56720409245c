"""Networks (or none) whose features metrics compare."""

from functools import partial
from pathlib import Path

import torch

from .base import FeatureExtractor
from .clean_fid import MODES, CleanFIDInception
from .inception import TorchFidelityInception
from .pixels import Pixels
from .transformers_models import DINOv2, ImageClassifier

__all__ = ["EXTRACTORS", "FeatureExtractor", "build_extractor"]

#: Name -> class, called with weights and device.
EXTRACTORS = {
    "inception": TorchFidelityInception,
    **{f"cleanfid_{mode}": partial(CleanFIDInception, mode) for mode in MODES},
    "dinov2": DINOv2,
}


def build_extractor(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> FeatureExtractor:
    """An extractor by its name.

    Args:
        name: A key of `EXTRACTORS`, "pixels", or the folder or Hub name of an image classifier.
        weights: File or folder of its weights, instead of the default.
        device: Where to run.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If there is no such extractor, or the weights are not its own.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name](weights=weights, device=device)
    if weights is not None:
        raise ValueError(f"--extractor_weights: {name} takes none.")
    if name == "pixels":
        return Pixels(device)
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or "/" not in name):
        raise ValueError(
            f"--extractor {name}: it must be one of {', '.join([*EXTRACTORS, 'pixels'])}, or the folder or Hub name "
            "of an image classifier."
        )
    return ImageClassifier(name, device)
