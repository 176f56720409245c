"""What an extractor of features is."""

import os
import re
import textwrap
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch


class FeatureExtractor(ABC):
    """Turns images into features, in two steps, the first of which may run in the workers of a data loader."""

    #: As it is asked for, and as it stands beside every number.
    name: str
    #: In words, how images come to the network's size.
    resize: str
    #: Names the weights; two extractors of one name and other weights give features that cannot be compared.
    fingerprint: str
    #: Which of "pool" (FID and the like), "spatial" (sFID) and "logits" (Inception Score) it gives.
    provides: frozenset[str]
    #: Dimension of each kind of features, where it does not depend on the images.
    dims: dict[str, int] = {}  # noqa: RUF012  (a constant)
    #: Whether numbers go by their published names: an FID is of Inception's features.
    is_inception: bool = False
    #: Images at a time. Fixed, and the last batch is filled up, so that no choice of the user changes a digit.
    batch_size: int = 64

    @abstractmethod
    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """An image of shape (height, width, 1 or 3), uint8, as the network wants it but for the batch."""

    @abstractmethod
    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Prepared images to features, each of shape (n, dim); on the device the extractor was built for."""

    @property
    def identity(self) -> dict[str, str]:
        """What must be the same for features to be comparable."""
        return {"extractor": self.name, "resize": self.resize, "weights": self.fingerprint}


def as_rgb(image: np.ndarray) -> np.ndarray:
    """An image with three channels; gray is repeated."""
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def find_weights(given: str | None, url: str) -> Path:
    """The file at `given`; without one, that of `url` in torch.hub's cache, downloaded if it is not there.

    Raises:
        FileNotFoundError: Says which file to put where.
    """
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"--extractor_weights: there is no file {given}.")
        return Path(given)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(url)  # noqa: PTH119  (a URL, not a path)
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            checksum = re.search(r"-([0-9a-f]{8})\.", url)  # the beginning of it, in the names that have one
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=checksum and checksum.group(1))
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"The weights are not here and cannot be downloaded ({error}): get {url} and put it at {cached}, or "
                "name the file by --extractor_weights."
            ) from error
    return cached


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a `.pth` file, which may hold nothing else.

    Raises:
        ValueError: If the file is something else.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no state dict: {brief(error)}") from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} is no state dict: it holds something else than named tensors.")
    return state_dict


def brief(error: Exception) -> str:
    """The beginning of an error's text: those of networks list every key."""
    return textwrap.shorten(str(error), 160) or type(error).__name__


#: Beyond this a covariance takes gigabytes and its eigenvalues an hour.
MAX_VALUES = 4096


class Pixels(FeatureExtractor):
    """The pixels themselves, as RGB, 0 to 1: for small images, where Inception has nothing to say.

    Args:
        device: Where to run.
    """

    name = "pixels"
    resize = "none"
    fingerprint = "none"
    provides = frozenset({"pool"})

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        image = as_rgb(image)
        if image.size > MAX_VALUES:
            raise ValueError(f"its {image.size} values are too many for pixels as features; at most {MAX_VALUES}")
        return torch.from_numpy(image.reshape(-1))

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pool": batch.float() / 255}
