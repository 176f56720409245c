"""Weight files of feature extractors: given, cached or downloaded."""

import os
import re
import textwrap
from pathlib import Path

import torch


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
