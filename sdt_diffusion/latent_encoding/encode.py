"""A data set into a cache of latents: on all processes, and resumable."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from ..data.decoding import CorruptImageError, ImageDecoder
from ..data.image_rows import ShardBatch, StoredRows, StreamedRows, shard_batches
from ..data.images import ImageArguments
from ..data.latent_cache import (
    FORMAT,
    MANIFEST_FILE,
    VERSION,
    checksum,
    has_size,
    is_latent_cache,
    read_manifest,
    shard_labels,
    write_shard,
)
from ..files import check_writable, write_atomically
from ..sdt.latents import LatentNormalisation
from ..settings import differences
from .arguments import EncodingArguments
from .encoder import ShardEncoder
from .vae import check_images_fit, describe_vae, latent_shape

PREVIEW_FILE = "preview.png"
#: Settings and records of a cache that is not finished.
UNFINISHED_FOLDER = "unfinished"


def encode_into(
    folder: Path,
    rows: StoredRows | StreamedRows,
    vae: nn.Module,
    images: ImageArguments,
    args: EncodingArguments,
    progress: bool = True,
) -> dict[str, Any]:
    """Fills a folder with the latents of a data set, starting from the shards that it holds already.

    Called by all processes, each of which encodes its share of the shards. A shard is written when it is done: a run
    that is killed loses one a process, and the same call encodes the rest.

    Args:
        folder: New, empty, or begun by the same call.
        rows: The data set.
        vae: The VAE, in fp32, whose weights are to be recognised; it is moved to the process's device and
            `args.vae_dtype`.
        images: How the data set was opened.
        args: How to encode.
        progress: Whether the main process shows a progress bar.

    Returns:
        The manifest.

    Raises:
        ValueError: If the folder holds something else, the images do not fit the VAE, latents are not finite, or too
            many images cannot be decoded.
    """
    state = PartialState()
    check_images_fit(vae, images)
    settings = _settings(rows, vae, images, args)
    if state.is_main_process:
        _claim(folder, settings)
    state.wait_for_everyone()
    finished = finished_shards(folder)
    state.wait_for_everyone()  # none is written before all have looked
    if is_latent_cache(folder) and len(finished) == len(read_manifest(folder)["shards"]):
        return read_manifest(folder)

    shape = latent_shape(vae, images.resolution)
    vae.to(state.device)
    if args.vae_dtype != "float32":
        vae.to(getattr(torch, args.vae_dtype))
    encode = ShardEncoder(vae, shape, getattr(torch, args.dtype))

    def is_mine(shard):
        return shard % state.num_processes == state.process_index and shard not in finished

    decode = ImageDecoder(images.resolution, images.image_mode)
    batches = shard_batches(rows, decode, args.shard_size, args.batch_size, is_mine, args.num_threads)
    unreadable = [text for record in finished.values() for text in record["unreadable"]]
    total = rows.num_rows and sum(is_mine(row // args.shard_size) for row in range(rows.num_rows))
    disable = not (progress and state.is_main_process)
    with tqdm(total=total, desc="Encoding", unit="image", disable=disable) as bar:
        for shard, of_shard in groupby(batches, key=lambda batch: batch.shard):
            before = len(unreadable)
            moments, labels = encode(_counted(of_shard, unreadable, args.max_unreadable, bar))
            if shard == 0:  # seen before all the others are encoded as wrongly
                preview = encode.preview(moments, rows.class_names, labels)
                write_atomically(folder / PREVIEW_FILE, preview.save)
            _save_shard(folder, shard, moments, labels, rows.class_names, unreadable[before:])
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(folder, settings, shape, args)
    state.wait_for_everyone()
    return read_manifest(folder)


def finished_shards(folder: Path) -> dict[int, dict[str, Any]]:
    """Number and record of every shard that is there, in order."""
    records = read_manifest(folder)["shards"] if is_latent_cache(folder) else []
    records += [json.loads(path.read_text()) for path in (folder / UNFINISHED_FOLDER).glob("shard-*.json")]
    whole = {int(re.search(r"\d+", record["file"])[0]): record for record in records if has_size(folder, record)}
    return dict(sorted(whole.items()))


def _settings(rows, vae, images, args):
    settings = {
        "dataset": images.dataset,
        "dataset_split": images.dataset_split,
        "num_rows": rows.num_rows,
        "class_names": rows.class_names,
        "resolution": images.resolution,
        "image_mode": images.image_mode,
        "crop": "centre, by ADM's rule",
        **describe_vae(vae),
        **LatentNormalisation.of(vae)._asdict(),
        "vae_dtype": args.vae_dtype,
        "dtype": args.dtype,
        "shard_size": args.shard_size,
        "batch_size": args.batch_size,  # another size rounds otherwise
    }
    return json.loads(json.dumps(settings))


def _claim(folder, settings):
    """Makes the folder this run's, if it is empty or of the same settings."""
    path = folder / UNFINISHED_FOLDER / "settings.json"
    if is_latent_cache(folder):
        there = read_manifest(folder)["settings"]
    elif path.is_file():
        there = json.loads(path.read_text())
    elif folder.exists() and not (folder.is_dir() and {item.name for item in folder.iterdir()} <= {UNFINISHED_FOLDER}):
        raise ValueError(f"{folder} holds something else than latents: give another --output_dir.")
    else:
        check_writable(path.parent)
        write_atomically(path, lambda partial: partial.write_text(json.dumps(settings)))
        return
    found = differences(there, settings, unquoted=("class_names",))
    if found:
        raise ValueError(
            f"{folder} holds latents made otherwise ({'; '.join(found)}). Delete it, or give another --output_dir."
        )
    path.parent.mkdir(exist_ok=True)


def _counted(batches, unreadable, limit, bar) -> Iterator[ShardBatch]:
    """Passes batches on, and stops when too many of their images are unreadable."""
    for batch in batches:
        unreadable += [str(image) for image in batch.images if isinstance(image, CorruptImageError)]
        _check_unreadable(unreadable, limit)
        yield batch
        bar.update(len(batch.images))


def _check_unreadable(unreadable, limit):
    if len(unreadable) > limit:
        named = "\n".join(unreadable[:20])
        raise ValueError(
            f"{len(unreadable)} images cannot be decoded, more than --max_unreadable {limit}; repair or remove them, "
            f"or raise the limit to leave them out:\n{named}"
        )


def _save_shard(folder, shard, moments, labels, class_names, unreadable):
    path = folder / f"shard-{shard:05d}.safetensors"
    write_atomically(path, lambda partial: write_shard(partial, moments, labels, class_names))
    record = {
        "file": path.name,
        "num_images": len(labels),
        "num_bytes": path.stat().st_size,
        "sha256": checksum(path),
        "unreadable": unreadable,
    }
    _write_json(folder / UNFINISHED_FOLDER / f"shard-{shard:05d}.json", record)


def _finish(folder, settings, shape, args):
    """Writes the manifest, which makes the shards a cache."""
    finished = finished_shards(folder)
    records = list(finished.values())
    if list(finished) != list(range(len(finished))):
        raise ValueError(f"{folder}: shards are missing between the others; run the same command again.")
    unreadable = [text for record in records for text in record["unreadable"]]
    _check_unreadable(unreadable, args.max_unreadable)
    num_images = sum(record["num_images"] for record in records)
    if not num_images:
        raise ValueError(f"{settings['dataset']} has no image that can be encoded.")
    labels = np.concatenate([shard_labels(folder / record["file"]) for record in records])
    class_names = settings["class_names"] or [str(label) for label in range(int(labels.max()) + 1)]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "vae_name": args.pretrained_vae_model_name_or_path,
        "settings": settings,
        "class_names": class_names,
        "images_per_class": np.bincount(labels, minlength=len(class_names)).tolist(),
        "num_images": num_images,
        "num_unreadable": len(unreadable),
        "moments_shape": [2, 2, *shape],
        "shards": records,
    }
    _write_json(folder / MANIFEST_FILE, manifest)
    shutil.rmtree(folder / UNFINISHED_FOLDER)


def _write_json(path, values):
    write_atomically(path, lambda partial: partial.write_text(json.dumps(values, indent=1)))
