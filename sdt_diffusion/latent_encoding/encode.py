"""A data set into a cache of latents: on all processes, and resumable."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from ..data.dataset_fingerprint import fingerprint_files
from ..data.decoding import CorruptImageError, ImageDecoder
from ..data.image_rows import ShardBatch, StoredRows, StreamedRows, shard_batches
from ..data.images import ImageArguments
from ..data.latent_cache import read_manifest
from ..files import FolderLock, write_atomically
from ..sdt.latents import LatentNormalisation
from .arguments import EncodingArguments
from .encoder import ShardEncoder
from .vae import check_images_fit, describe_vae, latent_shape
from .writer import CacheWriter

PREVIEW_FILE = "preview.png"


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
        ValueError: If the folder holds something else, another process writes to it, the images do not fit the VAE,
            latents are not finite, or too many images cannot be decoded.
    """
    state = PartialState()
    check_images_fit(vae, images)
    writer = CacheWriter(folder, _settings(rows, vae, images, args))
    with FolderLock(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            writer.claim()
        state.wait_for_everyone()
        finished, complete = writer.finished(), writer.is_complete()
        state.wait_for_everyone()  # none is written before all have looked
        if not complete:
            _encode_missing(writer, finished, rows, vae, images, args, progress)
        state.wait_for_everyone()
        if state.is_main_process:
            _check_unreadable(_unreadable(writer.finished()), args.max_unreadable)
            num_rows = writer.num_rows() if rows.num_rows is None else rows.num_rows
            writer.finish(args.pretrained_vae_model_name_or_path, latent_shape(vae, images.resolution), num_rows)
        state.wait_for_everyone()
    return read_manifest(folder)


def _encode_missing(writer, finished, rows, vae, images, args, progress):
    """Encodes this process's share of the shards that are not there."""
    state = PartialState()
    vae.to(state.device)
    if args.vae_dtype != "float32":
        vae.to(getattr(torch, args.vae_dtype))
    encode = ShardEncoder(vae, latent_shape(vae, images.resolution), getattr(torch, args.dtype))

    def is_mine(shard):
        return shard % state.num_processes == state.process_index and shard not in finished

    decode = ImageDecoder(images.resolution, images.image_mode)
    batches = shard_batches(rows, decode, args.shard_size, args.batch_size, is_mine, args.num_threads)
    unreadable = _unreadable(finished)
    total = rows.num_rows and sum(is_mine(row // args.shard_size) for row in range(rows.num_rows))
    with tqdm(total=total, desc="Encoding", unit="image", disable=not (progress and state.is_main_process)) as bar:
        for shard, of_shard in groupby(batches, key=lambda batch: batch.shard):
            before = len(unreadable)
            moments, labels = encode(_counted(of_shard, unreadable, args.max_unreadable, bar))
            if shard == 0:  # seen before all the others are encoded as wrongly
                preview = encode.preview(moments, labels, rows.class_names)
                write_atomically(writer.folder / PREVIEW_FILE, preview.save)
            writer.save(shard, moments, labels, unreadable[before:])


def _settings(rows, vae, images, args):
    return {
        "dataset": images.dataset,
        "dataset_split": images.dataset_split,
        "dataset_fingerprint": fingerprint_files(images.dataset),
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


def _counted(batches, unreadable, limit, bar) -> Iterator[ShardBatch]:
    """Passes batches on, and stops when too many of their images are unreadable."""
    for batch in batches:
        unreadable += [str(image) for image in batch.images if isinstance(image, CorruptImageError)]
        _check_unreadable(unreadable, limit)
        yield batch
        bar.update(len(batch.images))


def _unreadable(finished):
    return [text for record in finished.values() for text in record["unreadable"]]


def _check_unreadable(unreadable, limit):
    if len(unreadable) > limit:
        named = "\n".join(unreadable[:20])
        raise ValueError(
            f"{len(unreadable)} images cannot be decoded, more than --max_unreadable {limit}; repair or remove them, "
            f"or raise the limit to leave them out:\n{named}"
        )
