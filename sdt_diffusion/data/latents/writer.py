"""Write a cache of latents."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ...utils.files import LOCK_FILE, check_writable, write_atomically, write_json
from ...utils.fingerprint import differences
from ...utils.reading import checksum, read_json
from ..images import check_num_classes
from ..patch_features import PatchEncoder
from .cache import (
    CHECKSUMS,
    FORMAT,
    MANIFEST_FILE,
    MAX_SHARDS,
    RECORDS_FOLDER,
    SETTINGS_FILE,
    SHARD_FILE,
    VERSION,
    check_record,
    has_size,
    is_latent_cache,
    read_manifest,
    row_checksum,
    shard_labels,
)

AGAIN = "delete it and run the same command again."


class CacheWriter:
    """Writes the shards of a cache, in any order and from any number of processes, and then the manifest.

    A folder `records` keeps the settings, and size and checksum of each finished shard. The manifest is made from
    them.

    Args:
        folder: The folder of the cache.
        settings: What the latents depend on, of JSON's types, including the `dtype`, and the `class_names` and
            `num_rows` of the data set, which are `None` if they are not known.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.records = folder / RECORDS_FOLDER

    def claim(self) -> None:
        """Prepare the folder for this run.

        Raises:
            ValueError: If it holds something else, a damaged manifest, or latents of other settings; lists what
                differs.
        """
        for path in (self.folder / MANIFEST_FILE, self.records / SETTINGS_FILE):
            if path.exists() and not path.is_file():
                raise ValueError(f"{path} is not a file; delete it, or give another output_dir.")
        manifest = self._manifest()
        if path.is_file():
            there = _read_settings(path)
        elif manifest:
            there = manifest["settings"]
        elif self._holds_something_else():
            raise ValueError(f"{self.folder} holds something other than latents: give another output_dir.")
        else:
            there = self.settings
        found = differences(there, self.settings, unquoted=("class_names",))
        if found:
            raise ValueError(
                f"{self.folder} holds latents of other settings ({'; '.join(found)}). Delete it, or give another "
                "output_dir."
            )
        check_writable(self.records)
        if manifest and not path.is_file():  # copied without its records
            for record in manifest["shards"]:
                write_json(self._record_file(record["file"]), record, indent=1)
        write_json(path, self.settings, indent=1)

    def finished(self) -> dict[int, dict[str, Any]]:
        """Return the record of every finished shard by its number, in order."""
        files = [path for path in self.records.glob("*.json") if SHARD_FILE.fullmatch(f"{path.stem}.safetensors")]
        records = {int(path.stem.split("-")[1]): _read_record(path) for path in files}
        return {shard: records[shard] for shard in sorted(records) if has_size(self.folder, records[shard])}

    def num_rows(self) -> int | None:
        """Return the rows of the data set; for a stream `None` until it has been read to its end."""
        num_rows, manifest = self.settings["num_rows"], self._manifest()
        return _num_rows(manifest["shards"]) if num_rows is None and manifest else num_rows

    def num_done(self) -> int:
        """Return the rows of the finished shards."""
        return _num_rows(self.finished().values())

    def is_complete(self) -> bool:
        """Return whether all shards are written."""
        return self.num_done() == self.num_rows()

    def save(
        self,
        shard: int,
        moments: torch.Tensor,
        labels: torch.Tensor,
        unreadable: Sequence[str] = (),
        features: torch.Tensor | None = None,
    ) -> None:
        """Write a shard.

        Args:
            shard: Its number.
            moments: Shape (images, 2, moments, channels, height, width).
            labels: Shape (images,).
            unreadable: Messages about the images that were left out.
            features: Shape (images, 2, height, width, channels), float16.
        """
        check_num_shards(shard + 1)
        path = self.folder / f"shard-{shard:05d}.safetensors"
        self._record_file(path.name).unlink(missing_ok=True)  # it describes the file being replaced
        class_names = self.settings["class_names"]
        write_atomically(path, lambda partial: write_shard(partial, moments, labels, class_names, features))
        record = {
            "file": path.name,
            "num_images": len(labels),
            "num_bytes": path.stat().st_size,
            "sha256": checksum(path),
            "unreadable": list(unreadable),
        }
        write_json(self._record_file(path.name), record, indent=1)

    def finish(
        self,
        vae_name: str | None,
        latent_shape: Sequence[int],
        num_rows: int,
        num_moments: int = 2,
        encoder: PatchEncoder | None = None,
    ) -> None:
        """Write the manifest, which makes the shards a cache.

        Args:
            vae_name: Where the VAE came from.
            latent_shape: Channels, height and width.
            num_rows: Rows of the data set, which show whether shards are missing at the end.
            num_moments: 2 for the mean and the standard deviation, 1 for the mean alone.
            encoder: Whose features the shards hold.

        Raises:
            ValueError: If shards are missing or hold no images.
        """
        finished = self.finished()
        if list(finished) != list(range(len(finished))):
            raise ValueError(f"{self.folder}: shards are missing between others; run the same command again.")
        records = list(finished.values())
        if _num_rows(records) != num_rows:
            raise ValueError(
                f"{self.folder} has shards for {_num_rows(records)} images, and the data set has {num_rows}: run the "
                "same command again, or delete the folder if the data set has changed."
            )
        num_images = sum(record["num_images"] for record in records)
        if not num_images:
            raise ValueError(f"No image was encoded into {self.folder}: the data set has none that can be read.")
        labels = np.concatenate([shard_labels(self.folder / record["file"]) for record in records])
        check_num_classes(int(labels.max()) + 1, "label", str(self.settings.get("dataset")))
        class_names = self.settings["class_names"] or [str(label) for label in range(int(labels.max()) + 1)]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "vae_name": vae_name,
            "settings": self.settings,
            "class_names": class_names,
            "images_per_class": np.bincount(labels, minlength=len(class_names)).tolist(),
            "num_images": num_images,
            "num_unreadable": sum(len(record["unreadable"]) for record in records),
            "moments_shape": [2, num_moments, *latent_shape],
            "shards": records,
        }
        if encoder is not None:
            manifest |= {"alignment_model": encoder.name, "features_shape": [2, *encoder.feature_shape]}
        write_json(self.folder / MANIFEST_FILE, manifest, indent=1)

    def _manifest(self):
        """Return the manifest, or `None` if there is none yet."""
        is_there = is_latent_cache(self.folder) and (self.folder / MANIFEST_FILE).is_file()
        return read_manifest(self.folder) if is_there else None

    def _record_file(self, shard_file):
        return self.records / Path(shard_file).with_suffix(".json")

    def _holds_something_else(self):
        if not self.folder.is_dir():
            return self.folder.exists()
        return any(path.name not in (RECORDS_FOLDER, LOCK_FILE) for path in self.folder.iterdir())


def _num_rows(records):
    return sum(record["num_images"] + len(record["unreadable"]) for record in records)


def _read_record(path):
    record = _read_settings(path)
    try:
        check_record(record)
        if Path(record["file"]).stem != path.stem:
            raise ValueError(f"file is {record['file']}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {AGAIN}") from error
    return record


def _read_settings(path):
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{str(error).removesuffix('.')}; {AGAIN}") from error


def check_num_shards(num_shards: int) -> None:
    """Refuse more shards than a manifest can list.

    Raises:
        ValueError: If there are more than `MAX_SHARDS`.
    """
    if num_shards > MAX_SHARDS:
        raise ValueError(f"shard_size is too small: a cache has at most {MAX_SHARDS:,} shards.")


def write_shard(
    path: Path,
    moments: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str] | None,
    features: torch.Tensor | None = None,
) -> None:
    """Write a shard; see the docstring of `cache`.

    Args:
        path: The file.
        moments: Shape (images, 2, moments, channels, height, width).
        labels: Shape (images,).
        class_names: Names of the classes; `None` if they are not known yet.
        features: Shape (images, 2, height, width, channels), float16.
    """
    tensors = {"labels": labels.to(torch.int64)}
    for name, rows in (("moments", moments), ("features", features)):
        if rows is not None:
            tensors[name] = rows.contiguous()
            pairs = zip(tensors[name].numpy(), labels.tolist(), strict=True)
            checksums = [[row_checksum(side, label) for side in sides] for sides, label in pairs]
            tensors[CHECKSUMS[name]] = torch.tensor(checksums, dtype=torch.int64).reshape(-1, 2)
    save_file(tensors, path, metadata={"class_names": json.dumps(class_names and list(class_names))})
