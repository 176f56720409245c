"""A cache of latents, which are encoded once and then read from files image by image.

A cache is a folder of

- `shard-00000.safetensors`, ...: `moments` of shape (images, 2, 2, channels, height, width), which are mean and
  standard deviation of the VAE's posterior, not normalized, for an image and for its mirror; and `labels` of shape
  (images,), int64. The header's metadata name the classes.
- `manifest.json`: how they were made, the VAE's normalization, the classes, and size and checksum of every shard.
- `records`: the parts of the manifest, one file of settings and one for each shard, which are used to
  resume encoding and to repair a cache. Training does not need them.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..decoding import rename_classes

MANIFEST_FILE = "manifest.json"
RECORDS_FOLDER, SETTINGS_FILE = "records", "settings.json"
FORMAT, VERSION = "sdt_diffusion latents", 1
DTYPES = {"F16": "float16", "F32": "float32"}
#: Settings that training needs, besides the type of the latents.
READ_SETTINGS = ("resolution", "image_mode", "scaling_factor", "shift_factor")
SHARD_FILE = re.compile(r"shard-\d+\.safetensors")
#: Shards that a process keeps open; systems allow some 1,000 files.
MAX_OPEN_FILES = 512


class LatentCache:
    """The VAE posteriors of a data set's images, read from files on demand.

    The files are not mapped into memory: the pages of a mapping count as the process's memory until the system takes
    them back, and an error of the disk would kill the process without a message.

    Args:
        folder: The folder.
        mirrors: Read the mirrored image's posterior too.
        class_names: File of names for the classes; see `rename_classes`.

    Raises:
        ValueError: If it is not a cache, of another version, or incomplete; the message names the shard.
    """

    def __init__(self, folder: Path, mirrors: bool = False, class_names: str | None = None):
        self.folder, self.mirrors, self.name = folder, mirrors, str(folder)
        self.manifest = read_manifest(folder)
        self.class_names = rename_classes(self.manifest["class_names"], class_names, self.name)
        shards = [_open_shard(folder, record, self.manifest) for record in self.manifest["shards"]]
        self._paths = [folder / record["file"] for record in self.manifest["shards"]]
        self._offsets = [offset for offset, _ in shards]
        self.labels = np.concatenate([labels for _, labels in shards])
        self._starts = np.cumsum([0] + [len(labels) for _, labels in shards])
        self._dtype = np.dtype(self.manifest["settings"]["dtype"])
        self._files = {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return tuple(self.manifest["moments_shape"][2:])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the latents and their settings, wherever the cache is.

        They are the hash of the shards' checksums and of the settings without the data set's path and the batch size.
        """
        settings = {k: v for k, v in self.manifest["settings"].items() if k not in ("dataset", "batch_size")}
        identity = [settings, [record["sha256"] for record in self.manifest["shards"]]]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int]]:
        """Return moments and labels of some images.

        Moments have the shape (2, channels, height, width), or with `mirrors` (2, 2, channels, height, width): of the
        image and its mirror.
        """
        stored = self.manifest["moments_shape"]
        moments = np.empty((len(indices), *(stored if self.mirrors else stored[1:])), self._dtype)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        size = math.prod(stored) * self._dtype.itemsize
        for target, index, shard in zip(moments.view(np.uint8), indices, shards.tolist(), strict=True):
            offset = self._offsets[shard] + int(index - self._starts[shard]) * size
            if os.preadv(self._descriptor(shard), [target], offset) != target.nbytes:
                raise ValueError(f"{self._paths[shard]} has become shorter: encode its images again.")
        return list(zip(torch.from_numpy(moments), self.labels[indices].tolist(), strict=True))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.__getitems__([index])[0]

    def __getstate__(self):
        return {**self.__dict__, "_files": {}}

    def __del__(self):
        self.close()

    def close(self) -> None:
        """Close the shards; they are opened again when they are read."""
        files = self.__dict__.get("_files", {})  # none if `__init__` failed
        while files:
            files.popitem()[1].close()

    def _descriptor(self, shard):
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                self.close()
            self._files[shard] = self._paths[shard].open("rb", buffering=0)
        return self._files[shard].fileno()


def is_latent_cache(folder: Path) -> bool:
    """Return whether a folder is a cache, of any version, finished or not, damaged or not."""
    if (folder / RECORDS_FOLDER / SETTINGS_FILE).is_file():
        return True
    return (folder / MANIFEST_FILE).is_file() and any(folder.glob("shard-*.safetensors"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a cache.

    Raises:
        ValueError: If there is none, or it is of another version, or damaged; names the file and the key.
    """
    path = folder / MANIFEST_FILE
    if not (is_latent_cache(folder) and path.is_file()):
        raise ValueError(
            f"{path} is not a manifest of latents: train/encode_latents.py writes one after it has encoded all images."
        )
    try:
        manifest = json.loads(path.read_text())
        _require({"it": manifest}, "", it=dict)
        _require(manifest, "", format=str, version=int)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format is {manifest['format']!r}, not {FORMAT!r}")
        if manifest["version"] == VERSION:
            _check_manifest(manifest)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}. Delete it and run the command that made the cache: it writes the "
            f"manifest again from the files in {RECORDS_FOLDER}, without encoding."
        ) from error
    if manifest["version"] != VERSION:
        raise ValueError(
            f"{path} is of version {manifest['version']!r}, and this release reads version {VERSION}: encode the "
            "images again, or use the release that made it."
        )
    return manifest


def _check_manifest(manifest):
    _require(manifest, "", settings=dict, class_names=list, num_images=int, moments_shape=list, shards=list)
    _require(manifest, "", vae_name=str | None)
    settings, records = manifest["settings"], manifest["shards"]
    _require(settings, "settings.", dtype=str, **dict.fromkeys(READ_SETTINGS, object))
    if settings["dtype"] not in DTYPES.values():
        raise ValueError(f"settings.dtype is {settings['dtype']!r}, not one of {', '.join(DTYPES.values())}")
    for number, record in enumerate(records):
        _require({f"shards[{number}]": record}, "", **{f"shards[{number}]": dict})
        _require(record, f"shards[{number}].", file=str, num_images=int, num_bytes=int, sha256=str, unreadable=list)
        if not SHARD_FILE.fullmatch(record["file"]):  # a path could lead out of the folder
            raise ValueError(f"shards[{number}].file is {record['file']!r}, which is not a name of a shard")
    held = sum(record["num_images"] for record in records)
    if held != manifest["num_images"] or not held:
        raise ValueError(f"shards hold {held} images, and num_images is {manifest['num_images']}")


def _require(values, prefix, **types):
    """Refuse values that lack a key, or hold another type there."""
    for key, kind in types.items():
        if key not in values:
            raise ValueError(f"{prefix}{key} is missing")
        if not isinstance(values[key], kind):
            raise ValueError(f"{prefix}{key} is {values[key]!r:.40}")


def write_shard(path: Path, moments: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str] | None) -> None:
    """Write a shard; see the docstring of this module.

    Args:
        path: The file.
        moments: Shape (images, 2, 2, channels, height, width).
        labels: Shape (images,).
        class_names: Names of the classes; `None` if they are not known yet.
    """
    tensors = {"moments": moments.contiguous(), "labels": labels.to(torch.int64)}
    save_file(tensors, path, metadata={"class_names": json.dumps(class_names and list(class_names))})


def shard_labels(path: Path) -> np.ndarray:
    """Read the labels of a shard."""
    with safe_open(path, framework="numpy") as shard:
        return shard.get_tensor("labels")


def has_size(folder: Path, record: dict[str, Any]) -> bool:
    """Return whether a shard exists with the size that its record says."""
    path = folder / record["file"]
    return path.is_file() and path.stat().st_size == record["num_bytes"]


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(folder: Path, progress: bool = True) -> int:
    """Compare every byte of a cache with its checksums.

    Args:
        folder: The cache.
        progress: Whether to show a progress bar over the shards.

    Returns:
        Number of shards.

    Raises:
        ValueError: If shards are missing, cut off or changed; names them.
    """
    records = read_manifest(folder)["shards"]
    damaged = [
        record["file"]
        for record in tqdm(records, desc="Verifying", unit="shard", disable=not progress)
        if not has_size(folder, record) or checksum(folder / record["file"]) != record["sha256"]
    ]
    if damaged:
        raise ValueError(
            f"{folder}: {len(damaged)} of {len(records)} shards are damaged: {', '.join(damaged)}. Delete them and "
            "run the command that made the cache: it encodes what is missing."
        )
    return len(records)


def _open_shard(folder, record, manifest) -> tuple[int, np.ndarray]:
    """Return the position of the moments in the file, in bytes, and the labels."""
    path = folder / record["file"]
    if not has_size(folder, record):
        state = f"{path.stat().st_size} bytes long" if path.is_file() else "missing"
        raise ValueError(
            f"{path} is {state}, and should have {record['num_bytes']} bytes: run the command that made the cache, "
            "which encodes what is missing."
        )
    expected = [record["num_images"], *manifest["moments_shape"]], manifest["settings"]["dtype"]
    try:
        with safe_open(path, framework="numpy") as shard:
            moments, labels = shard.get_slice("moments"), shard.get_tensor("labels")
            found = moments.get_shape(), DTYPES.get(moments.get_dtype())
            class_names = json.loads(shard.metadata()["class_names"])
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            offset = 8 + header_size + json.loads(file.read(header_size))["moments"]["data_offsets"][0]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, delete it and encode its images again: {error}") from error
    if found != expected or len(labels) != record["num_images"]:
        raise ValueError(f"{path} holds {found[1]} of shape {found[0]}, not {expected[1]} of shape {expected[0]}.")
    if class_names not in (None, manifest["class_names"]):
        differing = sorted(set(class_names) ^ set(manifest["class_names"])) or ["their order"]
        raise ValueError(
            f"{path} has other classes than the manifest ({', '.join(differing[:10])} differ): it belongs to another "
            "cache."
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(manifest["class_names"])):
        raise ValueError(f"{path} has labels outside 0..{len(manifest['class_names']) - 1}.")
    return offset, labels
