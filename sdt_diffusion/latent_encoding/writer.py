"""A cache of latents in the making."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.latent_cache import (
    FORMAT,
    MANIFEST_FILE,
    UNFINISHED_FOLDER,
    VERSION,
    checksum,
    has_size,
    is_latent_cache,
    read_manifest,
    shard_labels,
    write_shard,
)
from ..files import LOCK_FILE, check_writable, write_atomically
from ..settings import differences


class CacheWriter:
    """Writes a cache's shards, in any order and by any number of processes, and at last the manifest.

    Until then a folder `unfinished` keeps the settings, and of each shard that is done its size and checksum.

    Args:
        folder: The folder of the cache.
        settings: What the latents depend on, as JSON can hold it; among it the `dtype`, and the `class_names` or
            `None` if they are not known.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.unfinished = folder / UNFINISHED_FOLDER

    def claim(self) -> None:
        """Makes the folder this run's.

        Raises:
            ValueError: If it holds something else, or latents of other settings; lists what differs.
        """
        path = self.unfinished / "settings.json"
        if is_latent_cache(self.folder):
            there = read_manifest(self.folder)["settings"]
        elif path.is_file():
            there = json.loads(path.read_text())
        elif self._holds_something_else():
            raise ValueError(f"{self.folder} holds something else than latents: give another --output_dir.")
        else:
            there = self.settings
        found = differences(there, self.settings, unquoted=("class_names",))
        if found:
            raise ValueError(
                f"{self.folder} holds latents made otherwise ({'; '.join(found)}). Delete it, or give another "
                "--output_dir."
            )
        check_writable(self.unfinished)
        _write_json(path, self.settings)

    def finished(self) -> dict[int, dict[str, Any]]:
        """Number and record of every shard that is there, in order."""
        records = read_manifest(self.folder)["shards"] if is_latent_cache(self.folder) else []
        records += [json.loads(path.read_text()) for path in self.unfinished.glob("shard-*.json")]
        whole = [record for record in records if has_size(self.folder, record)]
        return dict(sorted((int(re.search(r"\d+", record["file"])[0]), record) for record in whole))

    def is_complete(self) -> bool:
        """Whether nothing is left to be done."""
        return is_latent_cache(self.folder) and len(self.finished()) == len(read_manifest(self.folder)["shards"])

    def save(self, shard: int, moments: torch.Tensor, labels: torch.Tensor, unreadable: Sequence[str] = ()) -> None:
        """Writes a shard.

        Args:
            shard: Its number.
            moments: Shape (images, 2, 2, channels, height, width).
            labels: Shape (images,).
            unreadable: What is wrong with images that were left out.
        """
        path = self.folder / f"shard-{shard:05d}.safetensors"
        write_atomically(path, lambda partial: write_shard(partial, moments, labels, self.settings["class_names"]))
        record = {
            "file": path.name,
            "num_images": len(labels),
            "num_bytes": path.stat().st_size,
            "sha256": checksum(path),
            "unreadable": list(unreadable),
        }
        _write_json(self.unfinished / f"{path.stem}.json", record)

    def finish(self, vae_name: str | None, latent_shape: Sequence[int]) -> None:
        """Writes the manifest, which makes the shards a cache.

        Args:
            vae_name: Where the VAE came from.
            latent_shape: Channels, height and width.

        Raises:
            ValueError: If shards are missing, or there is no image in them.
        """
        finished = self.finished()
        if list(finished) != list(range(len(finished))):
            raise ValueError(f"{self.folder}: shards are missing between the others; run the same command again.")
        records = list(finished.values())
        num_images = sum(record["num_images"] for record in records)
        if not num_images:
            raise ValueError(f"There is no image to be kept in {self.folder}.")
        labels = np.concatenate([shard_labels(self.folder / record["file"]) for record in records])
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
            "moments_shape": [2, 2, *latent_shape],
            "shards": records,
        }
        _write_json(self.folder / MANIFEST_FILE, manifest)
        shutil.rmtree(self.unfinished)

    def _holds_something_else(self):
        if not self.folder.is_dir():
            return self.folder.exists()
        return any(path.name not in (UNFINISHED_FOLDER, LOCK_FILE) for path in self.folder.iterdir())


def _write_json(path, values):
    write_atomically(path, lambda partial: partial.write_text(json.dumps(values, indent=1)))
