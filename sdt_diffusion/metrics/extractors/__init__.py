"""Extractors of the features that metrics compare."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ...utils.arguments import require_at_least
from .base import FeatureExtractor, Pixels
from .inception import MODES, CleanFIDInception, TorchFidelityInception
from .transformers_models import DINOv2, ImageClassifier


@dataclass
class ExtractorArguments:
    """Which features to compare images by."""

    extractor: str = field(
        default="inception",
        metadata={
            "help": "inception (torch-fidelity's), cleanfid_clean, cleanfid_legacy_pytorch, "
            "cleanfid_legacy_tensorflow, dinov2, pixels, or the folder of an image classifier."
        },
    )
    extractor_weights: str | None = field(
        default=None, metadata={"help": "File (dinov2: folder) of its weights, instead of the published ones."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read and resize images."})

    def __post_init__(self):
        require_at_least(self, 0, "dataloader_num_workers")


__all__ = ["EXTRACTORS", "FeatureExtractor", "build_extractor"]

#: Name -> class, which is called with `weights` and `device`. A new extractor is one entry here.
EXTRACTORS: dict[str, Callable[..., FeatureExtractor]] = {
    "inception": TorchFidelityInception,
    **{f"cleanfid_{mode}": partial(CleanFIDInception, mode) for mode in MODES},
    "dinov2": DINOv2,
}


def build_extractor(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Build an extractor.

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
        raise ValueError(f"extractor_weights: {name} takes none.")
    if name == "pixels":
        return Pixels(device)
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or "/" not in name):
        raise ValueError(
            f"extractor {name!r}: it must be one of {', '.join([*EXTRACTORS, 'pixels'])}, or the folder or Hub name "
            "of an image classifier."
        )
    return ImageClassifier(name, device)
