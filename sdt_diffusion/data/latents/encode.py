"""Encode the images of a data set, and their mirror images, into a cache of latents that train_dit.py reads.

    accelerate launch train/encode_latents.py --dataset DATA --output_dir CACHE --pretrained_vae_model_name_or_path VAE
    accelerate launch train/encode_latents.py ... --dataset "tars/train-*.tar" --streaming True
    accelerate launch train/encode_latents.py ... --alignment_model facebook/dinov2-base  # and its features
    python train/encode_latents.py --output_dir CACHE --verify True

Run the same command again to continue an interrupted run. preview.png, written with the first shard, shows images
and their reconstructions by the VAE.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ...plots import image_grid
from ...sdt.vae import (
    LatentNormalization,
    VAELayout,
    check_images_fit,
    decode_raw_latents,
    describe_vae,
    latent_shape,
    posterior_moments,
)
from ...utils.arguments import exit_on_error, parse_arguments
from ...utils.files import FolderLock, require_space, write_atomically
from ...utils.fingerprint import fingerprint_files
from ...utils.ranges import CheckedArguments, at_least, between
from ..decoding import CorruptImageError, ImageDecoder
from ..images import ImageArguments
from ..patch_features import EncoderArguments, PatchEncoder
from .cache import read_manifest, verify
from .rows import ShardBatch, StoredRows, StreamedRows, open_rows, shard_batches
from .training_data import load_vae
from .writer import CacheWriter, check_num_shards

PREVIEW_FILE = "preview.png"
#: Images in the preview.
NUM_SHOWN = 8
#: Side of the images in pixels if neither the arguments nor the VAE set it.
DEFAULT_RESOLUTION = 256


@dataclass
class EncodingArguments(CheckedArguments):
    """How to encode, and where to write."""

    output_dir: Path = field(metadata={"help": "Folder of the cache."})
    pretrained_vae_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "AutoencoderKL, AutoencoderDC or AutoencoderRAE, a folder or a name on the Hub."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read tar, parquet or the Hub's files in order; otherwise `datasets` copies them first."},
    )
    batch_size: int = field(
        default=32,
        metadata={"help": "Images that are encoded at a time, and then their mirrors."} | between(1, 65_536),
    )
    shard_size: int = field(
        default=4096,
        metadata={"help": "Images in a file; a killed process loses one at most."} | between(1, 1_000_000),
    )
    dtype: Literal["float16", "float32"] = field(
        default="float16",
        metadata={"help": "Type of the latents; float16 is finer than the bfloat16 that networks train in."},
    )
    vae_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "The VAE's type."}
    )
    max_unreadable: int = field(
        default=10,
        metadata={"help": "Images that may be left out because they cannot be decoded; more are an error."}
        | at_least(0),
    )
    num_threads: int = field(
        default=4, metadata={"help": "Threads of each process that decode images."} | between(1, 1024)
    )
    verify: bool = field(
        default=False, metadata={"help": "Encode nothing, but compare --output_dir with its checksums."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.verify and self.pretrained_vae_model_name_or_path is None:
            raise ValueError("pretrained_vae_model_name_or_path must name the VAE to encode with.")


class ShardEncoder:
    """Encodes images and their mirror images.

    Args:
        vae: The VAE.
        resolution: Side of the images in pixels.
        dtype: Type of the moments.
        encoder: Gives features of the same images, in float16.
    """

    def __init__(self, vae: nn.Module, resolution: int, dtype: torch.dtype, encoder: PatchEncoder | None = None):
        self.vae, self.dtype, self.encoder = vae, dtype, encoder
        self.moments_shape = (VAELayout.of(vae).num_moments, *latent_shape(vae, resolution))
        self._shown: list[torch.Tensor] = []

    def __call__(self, batches: Iterator[ShardBatch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Encode the batches of a shard.

        Returns:
            Moments, shape (images, 2, moments, channels, height, width), labels, shape (images,), and, with an
            encoder, features, shape (images, 2, height, width, channels), of the images that could be decoded.

        Raises:
            ValueError: If moments or features are not finite.
        """
        moments, labels = [torch.empty(0, 2, *self.moments_shape, dtype=self.dtype)], []
        features = []
        if self.encoder is not None:
            features.append(torch.empty(0, 2, *self.encoder.feature_shape, dtype=torch.float16))
        self._shown = []
        for batch in batches:
            pairs = zip(batch.images, batch.labels, strict=True)
            readable = [(image, label) for image, label in pairs if isinstance(image, torch.Tensor)]
            if not readable:
                continue
            pixels = torch.stack([image for image, _ in readable])  # (B, channels, resolution, resolution)
            self._shown += pixels[: NUM_SHOWN - len(self._shown)]
            labels += [label for _, label in readable]
            moments.append(self.moments(pixels))
            if self.encoder is not None:
                features.append(self.features(pixels))
        return torch.cat(moments), torch.tensor(labels, dtype=torch.int64), torch.cat(features) if features else None

    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the moments of images and of their mirror images, on the CPU."""
        pixels = pixels.to(self.vae.device)
        both = [posterior_moments(self.vae, side) for side in (pixels, pixels.flip(-1))]
        moments = torch.stack(both, dim=1).to(self.dtype)  # (B, 2, 1 or 2, C, H, W)
        if not moments.isfinite().all():
            name = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"The VAE's latents are not finite in {name}: give dtype float32, or a more precise vae_dtype."
            )
        return moments.cpu()

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features of images and of their mirror images, on the CPU."""
        assert self.encoder is not None
        pixels = pixels.to(self.encoder.mean.device)
        features = torch.stack([self.encoder(side) for side in (pixels, pixels.flip(-1))], dim=1).half()
        if not features.isfinite().all():
            raise ValueError(f"The features of alignment_model {self.encoder.name} are not finite in float16.")
        return features.cpu()  # (B, 2, h, w, D)

    @torch.no_grad()
    def preview(self, moments: torch.Tensor, labels: torch.Tensor, class_names: list[str] | None) -> Image.Image:
        """Draw the shard's first images above their decoded latents and those of their mirror images."""
        if not self._shown:
            return Image.new("RGB", (64, 64), "white")
        means = moments[: len(self._shown), :, 0].to(self.vae.device, torch.float32)
        decoded = [decode_raw_latents(self.vae, side).cpu() for side in means.unbind(dim=1)]
        rows = (torch.stack(self._shown), *decoded)
        names = [class_names[label] if class_names else str(int(label)) for label in labels[: len(self._shown)]]
        texts = [*names, *["decoded"] * len(names), *["mirrored"] * len(names)]
        return image_grid([_picture(image) for row in rows for image in row], texts, columns=len(names))


def _picture(pixels):
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(values if values.shape[2] == 3 else values[..., 0])


def encode_into(
    folder: Path,
    rows: StoredRows | StreamedRows,
    vae: nn.Module,
    args: EncodingArguments,
    progress: bool = True,
    encoder: PatchEncoder | None = None,
) -> dict[str, Any]:
    """Fill a folder with the latents of a data set, starting from the shards that it holds already.

    Called by all processes, each of which encodes its share of the shards. A shard is written when it is complete: if
    the run is killed, each process loses at most one, and the same call encodes the rest.

    Args:
        folder: New, empty, or begun by the same call.
        rows: The data set.
        vae: The VAE in fp32, from which its fingerprint is computed; it is moved to the process's device and
            `args.vae_dtype`.
        args: How to encode.
        progress: Whether the main process shows a progress bar.
        encoder: Gives features to store beside the latents; it is moved to the process's device.

    Returns:
        The manifest.

    Raises:
        ValueError: If the folder holds something else, another process writes to it, the images do not fit the VAE or
            the encoder, latents or features are not finite, or too many images cannot be decoded.
        OSError: If the folder cannot be written to, or has no space for the latents.
    """
    state, (resolution, image_mode) = PartialState(), rows.arguments.size_and_mode
    check_images_fit(vae, resolution, image_mode)
    if encoder is not None:
        encoder.check_channels(len(image_mode))
    if rows.num_rows is not None:
        check_num_shards(math.ceil(rows.num_rows / args.shard_size))
    writer = CacheWriter(folder, _settings(rows, vae, args) | ({} if encoder is None else encoder.settings()))
    with FolderLock(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            writer.claim()
            num_rows = writer.num_rows()
            missing = args.shard_size if num_rows is None else num_rows - writer.num_done()
            num_bytes = _bytes_per_image(vae, resolution, args.dtype, encoder)
            require_space(folder, missing * num_bytes, "The latents")
        state.wait_for_everyone()
        finished, complete = writer.finished(), writer.is_complete()
        state.wait_for_everyone()  # all processes have to see the same shards
        if not complete:
            _encode_missing(writer, finished, rows, vae, args, progress, encoder)
        state.wait_for_everyone()
        if state.is_main_process:
            _check_unreadable(_unreadable(writer.finished()), args.max_unreadable)
            num_rows = writer.num_rows() if rows.num_rows is None else rows.num_rows
            assert num_rows is not None  # the rows were read to the end, or the manifest counts them
            shape, num_moments = latent_shape(vae, resolution), VAELayout.of(vae).num_moments
            writer.finish(args.pretrained_vae_model_name_or_path, shape, num_rows, num_moments, encoder)
        state.wait_for_everyone()
    return read_manifest(folder)


def _bytes_per_image(vae, resolution, dtype, encoder):
    """Return the size of an image in a shard: moments and features of two sides, a label and their checksums."""
    numbers = 2 * VAELayout.of(vae).num_moments * math.prod(latent_shape(vae, resolution))
    latents = numbers * getattr(torch, dtype).itemsize + 24
    return latents + (0 if encoder is None else 2 * math.prod(encoder.feature_shape) * 2 + 16)


def _encode_missing(writer, finished, rows, vae, args, progress, encoder):
    """Encode this process's share of the missing shards."""
    state, (resolution, image_mode) = PartialState(), rows.arguments.size_and_mode
    vae.to(state.device)
    if args.vae_dtype != "float32":
        vae.to(getattr(torch, args.vae_dtype))
    if encoder is not None:
        encoder.to(state.device)
    encode = ShardEncoder(vae, resolution, getattr(torch, args.dtype), encoder)

    def is_mine(shard):
        return shard % state.num_processes == state.process_index and shard not in finished

    decode = ImageDecoder(resolution, image_mode)
    batches = shard_batches(rows, decode, args.shard_size, args.batch_size, is_mine, args.num_threads)
    unreadable = _unreadable(finished)
    total = rows.num_rows and sum(is_mine(row // args.shard_size) for row in range(rows.num_rows))
    with tqdm(total=total, desc="Encoding", unit="image", disable=not (progress and state.is_main_process)) as bar:
        for shard, of_shard in groupby(batches, key=lambda batch: batch.shard):
            before = len(unreadable)
            moments, labels, features = encode(_counted(of_shard, unreadable, args.max_unreadable, bar))
            if shard == 0:  # written early, so that mistakes show before everything is encoded
                preview = encode.preview(moments, labels, rows.class_names)
                write_atomically(writer.folder / PREVIEW_FILE, preview.save)
            writer.save(shard, moments, labels, unreadable[before:], features)


def _settings(rows, vae, args):
    images, num_moments = rows.arguments, VAELayout.of(vae).num_moments
    return {
        "dataset": images.dataset,
        "dataset_split": images.dataset_split,
        "dataset_fingerprint": fingerprint_files(images.dataset),
        "num_rows": rows.num_rows,
        "class_names": rows.class_names,
        "resolution": images.resolution,
        "image_mode": images.image_mode,
        "crop": "centre, by ADM's rule",  # existing caches have this spelling, and settings are compared
        **describe_vae(vae),
        **LatentNormalization.of(vae)._asdict(),
        **({} if num_moments == 2 else {"num_moments": num_moments}),  # existing caches hold 2
        "vae_dtype": args.vae_dtype,
        "dtype": args.dtype,
        "shard_size": args.shard_size,
        "batch_size": args.batch_size,  # rounding depends on it
    }


def _counted(batches, unreadable, limit, bar) -> Iterator[ShardBatch]:
    """Iterate over the batches, until too many of their images are unreadable."""
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
            f"{len(unreadable)} images cannot be decoded, more than max_unreadable {limit}; repair or remove "
            f"them, or raise max_unreadable to leave them out:\n{named}"
        )


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    types = (EncodingArguments, ImageArguments, EncoderArguments)
    args, image_args, encoder_args = parse_arguments(types, argv, description=__doc__)
    if args.verify:
        print(f"All {verify(args.output_dir)} shards of {args.output_dir} are as they were written.")
        return
    # At the end processes wait for the slowest, which may have a whole shard left.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    assert args.pretrained_vae_model_name_or_path is not None  # checked by the arguments
    vae, encoder = load_vae(args.pretrained_vae_model_name_or_path), encoder_args.load()
    with state.local_main_process_first():  # `datasets` may have to copy the data set
        rows = open_rows(image_args, args.streaming, VAELayout.of(vae).resolution or DEFAULT_RESOLUTION)
    manifest = encode_into(args.output_dir, rows, vae, args, encoder=encoder)
    if state.is_main_process:
        left_out = manifest["num_unreadable"]
        print(
            f"{manifest['num_images']} images of {len(manifest['class_names'])} classes are in {args.output_dir}"
            + (f"; {left_out} could not be decoded, see manifest.json." if left_out else ".")
        )


if __name__ == "__main__":
    main()
