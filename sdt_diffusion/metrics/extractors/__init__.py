"""Extractors of the features that metrics compare."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from ...utils.files import check_temporary_folder
from ...utils.ranges import CheckedArguments, between
from .base import FeatureExtractor, Pixels
from .inception import MODES, CleanFIDInception, TorchFidelityInception
from .transformers_models import DINOv2, ImageClassifier


@dataclass
class ExtractorArguments(CheckedArguments):
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
    trust_extractor_weights: bool = field(
        default=False,
        metadata={
            "help": "Take extractor_weights in TorchScript that are not the published ones. The file is a program, "
            "which is executed."
        },
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that read and resize images."} | between(0, 1024)
    )

    def __post_init__(self):
        super().__post_init__()
        check_temporary_folder(self.dataloader_num_workers)

    def build(self, device: torch.device | str) -> FeatureExtractor:
        """Build the extractor; see `build_extractor`."""
        return build_extractor(self.extractor, self.extractor_weights, device, self.trust_extractor_weights)


__all__ = ["EXTRACTORS", "ExtractorArguments", "FeatureExtractor", "build_extractor"]

#: Name -> class, which is called with `weights` and `device`. A new extractor is one entry here.
EXTRACTORS: dict[str, Callable[..., FeatureExtractor]] = {
    "inception": TorchFidelityInception,
    **{f"cleanfid_{mode}": partial(CleanFIDInception, mode) for mode in MODES},
    "dinov2": DINOv2,
}


#: Extractors whose files of weights are TorchScript, and so executed.
EXECUTED = ("cleanfid_clean", "cleanfid_legacy_tensorflow")


def build_extractor(
    name: str, weights: str | None = None, device: torch.device | str = "cpu", trust_weights: bool = False
) -> FeatureExtractor:
    """Build an extractor.

    Args:
        name: A key of `EXTRACTORS`, "pixels", or the folder or Hub name of an image classifier.
        weights: File or folder of its weights, instead of the default.
        device: Where to run.
        trust_weights: Execute weights in TorchScript that are not the published ones.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If there is no such extractor, or the weights are not its own, or not trusted.
    """
    if trust_weights and (name not in EXECUTED or weights is None):
        raise ValueError(
            f"trust_extractor_weights is for extractor_weights of {' and '.join(EXECUTED)}; leave it out."
        )
    if name in EXTRACTORS:
        consent = {"trust_weights": True} if trust_weights else {}
        return EXTRACTORS[name](weights=weights, device=device, **consent)
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
