"""The interface of extractors, the one without a network, and helpers to load weights."""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

from ...utils.pretrained import brief

#: Inception's weights have 91 MiB; a far larger file is another one.
MAX_WEIGHTS_BYTES = 1 << 30


class FeatureExtractor(ABC):
    """Turns images into features in two steps; the first may run in the workers of a data loader."""

    #: Its name, which is recorded beside every number.
    name: str
    #: How images are resized for the network, in words.
    resize: str
    #: Identifies the weights; features of other weights cannot be compared.
    fingerprint: str
    #: Which of "pool" (FID, KID, precision, recall), "spatial" (sFID) and "logits" (Inception Score) it returns.
    provides: frozenset[str]
    #: Dimension of each kind of features, where it does not depend on the images.
    dims: dict[str, int] = {}  # noqa: RUF012  (a constant)
    #: Whether the features are Inception's, so that numbers carry the published names, such as FID.
    is_inception: bool = False
    #: Images at a time; constant, and the last batch is padded, because the size of a batch changes rounding.
    batch_size: int = 64

    @abstractmethod
    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """Prepare an image of shape (height, width, 1 or 3), uint8, for the network; without the batch axis."""

    @abstractmethod
    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return features, each of shape (n, dim), of prepared images on the extractor's device."""

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for features to be comparable."""
        return {"extractor": self.name, "resize": self.resize, "weights": self.fingerprint}


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Return an image of three channels; a gray one is repeated."""
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


class Weights(NamedTuple):
    """A file of weights, read once, so that what was checked is what is loaded.

    Args:
        path: Its path, for messages.
        content: Its bytes.
        published: Whether they are those of the published file.
    """

    path: Path
    content: bytes
    published: bool


def read_weights(given: str | None, url: str, sha256: str) -> Weights:
    """Read the file `given`; without one, that of `url` in torch.hub's cache, after a download if need be.

    Args:
        given: Path of the file, or `None`.
        url: Where the published file is.
        sha256: SHA-256 of the published file, which a download and the cache must have.

    Raises:
        FileNotFoundError: If there is none; says which file to put where.
        ValueError: If it cannot be read, or the cache holds another file than the published one.
    """
    path = _downloaded(url, sha256) if given is None else Path(given)
    if not path.is_file():  # a named pipe would wait for a writer
        raise FileNotFoundError(f"extractor_weights: there is no file {path}.")
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, too many for the weights of an Inception.")
    content = path.read_bytes()
    published = hashlib.sha256(content).hexdigest() == sha256
    if given is None and not published:
        raise ValueError(f"{path} is damaged, or not the file of {url}: delete it, and it is downloaded again.")
    return Weights(path, content, published)


def _downloaded(url: str, sha256: str) -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(url)  # noqa: PTH119  (a URL, not a path)
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"The weights are not here and cannot be downloaded ({brief(error)}): get {url} and put it at "
                f"{cached}, or name the file as extractor_weights."
            ) from error
    return cached


def state_dict_of(weights: Weights) -> dict[str, torch.Tensor]:
    """Return the tensors of a `.pth` or `.safetensors` file, which may hold nothing else; no code of it runs.

    Raises:
        ValueError: If the file is something else.
    """
    path, content, _ = weights
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        state_dict = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a state dict: {brief(error)}") from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} is not a state dict: it holds something else than named tensors.")
    return state_dict


@contextmanager
def refused_as(what: str) -> Iterator[None]:
    """Let a network that cannot take its inputs raise `ValueError` with `what` before its own words."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{what}: {brief(error)}") from error


#: Largest dimension: beyond it a covariance takes gigabytes, and its eigenvalues an hour.
MAX_VALUES = 4096


class Pixels(FeatureExtractor):
    """The pixels themselves, as RGB in 0 to 1, for images too small for Inception.

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
        """Return the RGB values of an image."""
        image = as_rgb(image)
        if image.size > MAX_VALUES:
            raise ValueError(f"its {image.size} values are too many for pixels as features; at most {MAX_VALUES}")
        return torch.from_numpy(image.reshape(-1))

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the values in 0 to 1."""
        return {"pool": batch.float() / 255}
