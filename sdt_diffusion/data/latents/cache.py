"""A cache of latents, which are encoded once and then read from files image by image.

A cache is a folder of

- `shard-00000.safetensors`, ...: `moments` of shape (images, 2, 2, channels, height, width), which are mean and
  standard deviation of the VAE's posterior, not normalized, for an image and for its mirror, or of shape (images, 2,
  1, channels, height, width), which are the latents of a VAE without a posterior; `labels` of shape
  (images,), int64; and `checksums` of shape (images, 2), int64, which earlier releases did not write, see
  `row_checksum`. The header's metadata name the classes. If the images were encoded for alignment, there are
  `features` of shape (images, 2, height, width, channels), float16, and `feature_checksums` too.
- `manifest.json`: how they were made, the VAE's normalization, the classes, and size and checksum of every shard.
- `records`: the parts of the manifest, one file of settings and one for each shard, which are used to
  resume encoding and to repair a cache. Training does not need them.
"""

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from tqdm.auto import tqdm

from ...utils.ranges import Range, check_value
from ...utils.reading import checksum, read_json, shortened
from ..decoding import rename_classes
from ..patch_features import ImagesWithFeatures

MANIFEST_FILE = "manifest.json"
RECORDS_FOLDER, SETTINGS_FILE = "records", "settings.json"
FORMAT, VERSION = "sdt_diffusion latents", 1
DTYPES = {"F16": "float16", "F32": "float32"}
#: Tensor of a shard -> the tensor of its checksums.
CHECKSUMS = {"moments": "checksums", "features": "feature_checksums"}
#: Settings that training needs, besides the type of the latents -> their types and ranges.
READ_SETTINGS: dict[str, tuple[tuple[Any, ...], Range | None]] = {
    "resolution": ((int,), Range(1, 2**20)),
    "image_mode": ((Literal["RGB", "L"],), None),
    "scaling_factor": ((float,), Range(0, 1e9, with_least=False)),
    "shift_factor": ((float,), Range(-1e9, 1e9)),
}
#: Those that may be a list with a number for each channel.
PER_CHANNEL = ("scaling_factor", "shift_factor")
SHARD_FILE = re.compile(r"shard-\d+\.safetensors")
#: Shards of a cache, which the manifest lists.
MAX_SHARDS = 100_000
#: Shards that a process keeps open; systems allow some 1,000 files.
MAX_OPEN_FILES = 512
#: What to do with a damaged shard.
REPAIR = "Delete the file and run the command that made the cache: it encodes what is missing."


class LatentCache:
    """The VAE posteriors of a data set's images, read from files on demand.

    The moments and the label of every image that is read are compared with its checksum, so that a flipped bit ends a
    run. Caches of earlier releases have no such checksums; `verify` compares every byte of any cache.

    The files are not mapped into memory: the pages of a mapping count as the process's memory until the system takes
    them back, and an error of the disk would kill the process without a message.

    Args:
        folder: The folder.
        mirrors: Read the mirrored image's posterior too.
        class_names: File of names for the classes; see `rename_classes`.
        features: Read the features of an encoder too.

    Raises:
        ValueError: If it is not a cache, of another version, incomplete, or without features; names the shard.
    """

    def __init__(self, folder: Path, mirrors: bool = False, class_names: str | None = None, features: bool = False):
        self.folder, self.mirrors, self.name = folder, mirrors, str(folder)
        self.manifest = read_manifest(folder)
        self.class_names = rename_classes(self.manifest["class_names"], class_names, self.name)
        if features and self.feature_shape is None:
            raise ValueError(
                f"alignment_model needs features, and {folder} holds latents without features: encode the images with "
                "this alignment_model, or train from the images themselves."
            )
        self._tensors = {"moments": (self.manifest["moments_shape"], np.dtype(self.manifest["settings"]["dtype"]))}
        if features:
            self._tensors["features"] = (self.manifest["features_shape"], np.dtype("float16"))
        shards = [_open_shard(folder, record, self.manifest, self._tensors) for record in self.manifest["shards"]]
        self._paths = [folder / record["file"] for record in self.manifest["shards"]]
        self._stored = [stored for stored, _ in shards]
        self.labels = np.concatenate([labels for _, labels in shards])
        self._starts = np.cumsum([0] + [len(labels) for _, labels in shards])
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
    def feature_shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels of the features that are stored beside the latents, if there are any."""
        shape = self.manifest.get("features_shape")
        return tuple(shape[1:]) if shape else None

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

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """Return moments and labels of some images.

        Moments have the shape (moments, channels, height, width), or with `mirrors` (2, moments, channels, height,
        width): of the image and its mirror. With features, they are `ImagesWithFeatures`, in the same form.

        Raises:
            ValueError: If they are not those that were written, or not finite; names the shard.
            OSError: If the shard cannot be read.
        """
        if not len(indices):
            return []
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        found = []
        for name, (shape, dtype) in self._tensors.items():
            rows = np.empty((len(indices), *(shape if self.mirrors else shape[1:])), dtype)
            for target, index, shard in zip(rows, indices, shards.tolist(), strict=True):
                self._read(name, target, shard, int(index - self._starts[shard]), int(self.labels[index]))
            largest = torch.from_numpy(rows).abs().flatten(1).amax(1)  # NaN where there is one
            if not largest.isfinite().all():
                worst = int(largest.isfinite().logical_not().nonzero()[0])
                path, place = self._paths[shards[worst]], int(indices[worst] - self._starts[shards[worst]])
                what = "latents" if name == "moments" else name
                raise ValueError(f"{path} cannot be used: the {what} of image {place} are NaN or infinite. {REPAIR}")
            found.append(torch.from_numpy(rows))
        images = found[0] if len(found) == 1 else map(ImagesWithFeatures, *found)
        return list(zip(images, self.labels[indices].tolist(), strict=True))

    def __getitem__(self, index: int) -> tuple[Any, int]:
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

    def _read(self, name, target, shard, place, label):
        """Read the moments or features of an image of a shard into an array, and check them."""
        path, (shape, dtype) = self._paths[shard], self._tensors[name]
        offset, checksums = self._stored[shard][name]
        offset += place * math.prod(shape) * dtype.itemsize
        try:
            found = os.preadv(self._descriptor(shard), [target.view(np.uint8)], offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if found != target.nbytes:
            raise ValueError(f"{path} has become shorter: encode its images again.")
        sides = target if self.mirrors else target[None]
        if checksums is not None and any(
            row_checksum(side, label) != expected for side, expected in zip(sides, checksums[place], strict=False)
        ):
            raise ValueError(f"{path} is damaged: image {place} is not as it was written. {REPAIR}")

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
        manifest = read_json(path)
        _require(manifest, "", format=str, version=int)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format is {manifest['format']!r}, not {FORMAT!r}")
        if manifest["version"] == VERSION:
            _check_manifest(manifest)
    except ValueError as error:
        problem = str(error).removeprefix(f"{path} is damaged: ").removesuffix(".")
        raise ValueError(
            f"{path} is damaged: {problem}. Delete it and run the command that made the cache: it writes the "
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
    settings, records, shape = manifest["settings"], manifest["shards"], manifest["moments_shape"]
    _require(settings, "settings.", dtype=str, **dict.fromkeys(READ_SETTINGS, object))
    if settings["dtype"] not in DTYPES.values():
        raise ValueError(f"settings.dtype is {settings['dtype']!r}, not one of {', '.join(DTYPES.values())}")
    _check_shape("moments_shape", shape, ["2", "1 or 2", "channels", "height", "width"])
    for key, (kinds, allowed) in READ_SETTINGS.items():
        value = settings[key]
        each_channel = key in PER_CHANNEL and isinstance(value, list) and len(value) == shape[2]
        for item in value if each_channel else [value]:
            check_value(f"settings.{key}", item, kinds, allowed)
    if len({isinstance(settings[key], list) for key in PER_CHANNEL}) > 1:
        raise ValueError(f"of settings.{' and settings.'.join(PER_CHANNEL)} one is a list")
    if "features_shape" in manifest:
        _require(manifest, "", features_shape=list, alignment_model=str)
        _require(settings, "settings.", alignment_resolution=int, alignment_layer=int | None)
        _check_shape("features_shape", manifest["features_shape"], ["2", "height", "width", "channels"])
    if not all(isinstance(name, str) for name in manifest["class_names"]):
        raise ValueError("class_names holds something other than names")
    for number, record in enumerate(records):
        _require({f"shards[{number}]": record}, "", **{f"shards[{number}]": dict})
        check_record(record, f"shards[{number}].")
    held = sum(record["num_images"] for record in records)
    if held != manifest["num_images"] or not held:
        raise ValueError(f"shards hold {held} images, and num_images is {manifest['num_images']}")


def _check_shape(key, shape, axes):
    sizes = len(shape) == len(axes) and all(type(size) is int and 0 < size < 2**20 for size in shape)
    counts = {"2": [2], "1 or 2": [1, 2]}
    if not sizes or any(size not in counts.get(axis, [size]) for axis, size in zip(axes, shape, strict=True)):
        raise ValueError(f"{key} is {shape!r:.60}, and not [{', '.join(axes)}]")


def check_record(record: dict[str, Any], prefix: str = "") -> None:
    """Refuse the record of a shard that lacks a value, or has another kind of value.

    Raises:
        ValueError: Names the value, behind the prefix.
    """
    _require(record, prefix, file=str, num_images=int, num_bytes=int, sha256=str, unreadable=list)
    if not SHARD_FILE.fullmatch(record["file"]):  # a path could lead out of the folder
        raise ValueError(f"{prefix}file is {record['file']!r}, which is not a name of a shard")
    if record["num_images"] < 0:
        raise ValueError(f"{prefix}num_images is {record['num_images']}")


def _require(values, prefix, **types):
    """Refuse values that lack a key, or hold another type there."""
    for key, kind in types.items():
        if key not in values:
            raise ValueError(f"{prefix}{key} is missing")
        if not isinstance(values[key], kind) or (kind is int and isinstance(values[key], bool)):
            raise ValueError(f"{prefix}{key} is {values[key]!r:.40}")


def row_checksum(values: np.ndarray, label: int) -> int:
    """Return the checksum of the moments or features, and of the label, of an image or its mirror.

    It is a CRC-32, which notices every flipped bit and costs little beside reading.
    """
    return zlib.crc32(values.data, label & 0xFFFFFFFF)


def shard_labels(path: Path) -> np.ndarray:
    """Read the labels of a shard.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as shard:
            return shard.get_tensor("labels")
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}. {REPAIR}") from error


def has_size(folder: Path, record: dict[str, Any]) -> bool:
    """Return whether a shard exists with the size that its record says."""
    path = folder / record["file"]
    return path.is_file() and path.stat().st_size == record["num_bytes"]


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
            f"{folder}: {len(damaged)} of {len(records)} shards are damaged: {shortened(damaged, 20)}. Delete them "
            "and run the command that made the cache: it encodes what is missing."
        )
    return len(records)


def _open_shard(folder, record, manifest, wanted) -> tuple[dict[str, tuple[int, np.ndarray | None]], np.ndarray]:
    """Return, for each wanted tensor, its position in the file, in bytes, and its checksums if any; and the labels."""
    path = folder / record["file"]
    if not has_size(folder, record):
        state = f"{path.stat().st_size} bytes long" if path.is_file() else "missing"
        raise ValueError(
            f"{path} is {state}, and should have {record['num_bytes']} bytes: run the command that made the cache, "
            "which encodes what is missing."
        )
    count = record["num_images"]
    found, checksums = {}, {}
    try:
        with safe_open(path, framework="numpy") as shard:
            labels = shard.get_tensor("labels")
            for name in wanted:
                stored, of_rows = shard.get_slice(name), CHECKSUMS[name]
                found[name] = stored.get_shape(), DTYPES.get(stored.get_dtype())
                checksums[name] = shard.get_tensor(of_rows) if of_rows in shard.keys() else None  # noqa: SIM118
            class_names = json.loads(shard.metadata()["class_names"])
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
            offsets = {name: 8 + header_size + header[name]["data_offsets"][0] for name in wanted}
    except Exception as error:  # safetensors raises errors of many kinds for damaged files
        raise ValueError(f"{path} is damaged, delete it and encode its images again: {error}") from error
    for name, (shape, dtype) in wanted.items():
        there, expected = found[name], ([count, *shape], str(dtype))
        if there != expected:
            raise ValueError(f"{path} holds {there[1]} of shape {there[0]}, not {expected[1]} of shape {expected[0]}.")
    rows = [("labels", labels, (count,)), *((CHECKSUMS[name], checksums[name], (count, 2)) for name in wanted)]
    for name, values, shape in rows:
        if values is not None and (values.dtype != np.int64 or values.shape != shape):
            raise ValueError(
                f"{path} holds {name} of type {values.dtype} and shape {values.shape}, not int64 {shape}."
            )
    if class_names not in (None, manifest["class_names"]):
        names = {str(name) for name in class_names} if isinstance(class_names, list) else {str(class_names)}
        differing = sorted(names ^ set(manifest["class_names"])) or ["their order"]
        raise ValueError(
            f"{path} has other classes than the manifest ({shortened(differing, 10)} differ): it belongs to another "
            "cache."
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(manifest["class_names"])):
        raise ValueError(f"{path} has labels outside 0..{len(manifest['class_names']) - 1}.")
    return {name: (offsets[name], checksums[name]) for name in wanted}, labels
