"""Extract the features that metrics need, on all processes, in memory that does not grow with the number of images."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import CorruptImageError
from ..data.raw_images import NpzImages, RawImageArguments, RawImages, open_images
from ..utils.ranges import Range, check_number
from .extractors import FeatureExtractor
from .extractors.base import refused_as
from .features import (
    MAX_DIM,
    MAX_FEATURES,
    FeatureFile,
    FeatureSummary,
    RunningGaussian,
    has_statistics,
    load_summary,
    names_in_npz,
)
from .inception_score import RunningInceptionScore
from .registry import check_reference

#: Seed of the random subset of images whose features are kept.
SUBSET_SEED = 2020


def summarize(
    images: RawImages,
    extractor: FeatureExtractor,
    statistics: Sequence[str] = ("pool",),
    num_features: int | None = 0,
    inception_splits: int = 0,
    feature_folder: Path = Path(),
    num_workers: int = 0,
    desc: str = "Features",
) -> FeatureSummary | None:
    """Extract features of images and summarize them.

    Called by all processes, which share the batches of images. The features are gathered and added up in the order of
    the images, so that the number of processes changes nothing.

    Args:
        images: The images.
        extractor: The extractor.
        statistics: Kinds of features whose mean and covariance to compute.
        num_features: Images, at random, whose pooled features to keep; 0 for none, `None` for all.
        inception_splits: Splits of the Inception Score; 0 for none.
        feature_folder: Folder on the disk to keep features on; no file is left behind.
        num_workers: Processes that read and prepare images.
        desc: Title of the progress bar.

    Returns:
        The summary on the main process, `None` on the others.

    Raises:
        CorruptImageError: If an image cannot be used; the message names it.
        ValueError: If there are too few images, or features that are not finite.
    """
    state = PartialState()
    check_number("num_features", num_features or 0, Range(0, MAX_FEATURES))
    check_number("inception_splits", inception_splits, Range(0, len(images)))
    check_number("num_workers", num_workers, Range(0, 1024))
    if statistics and len(images) < 2:
        raise ValueError(f"{images.name}: a covariance needs at least 2 images, not {len(images)}.")
    gaussians = {kind: RunningGaussian() for kind in statistics}
    score = RunningInceptionScore(len(images), inception_splits) if inception_splits else None
    kept = _subset(len(images), num_features)
    store = None
    kinds = {*statistics, *(["pool"] if len(kept) else []), *(["logits"] if score else [])}
    with tqdm(total=len(images), desc=desc, unit="image", disable=not state.is_main_process) as bar:
        for start, features in _features_in_order(images, extractor, kinds, num_workers, state):
            bar.update(len(next(iter(features.values()))))
            if not state.is_main_process:
                continue
            for kind, gaussian in gaussians.items():
                gaussian.update(features[kind])
            if score:
                score.update(features["logits"])
            if len(kept):
                pool = features["pool"].cpu().numpy()
                store = store or FeatureFile(feature_folder, len(kept), pool.shape[1])
                first, last = np.searchsorted(kept, [start, start + len(pool)])
                store.append(pool[kept[first:last] - start])
    if not state.is_main_process:
        return None
    return FeatureSummary(
        {kind: gaussian.result() for kind, gaussian in gaussians.items()},
        store,
        score.result() if score else None,
        {**images.describe(), **extractor.identity},
    )


@dataclass
class Reference:
    """What samples are compared with: images, or a file of their statistics, or both.

    Args:
        path: The path or name that was given.
        images: The images; `None` if there are only statistics.
        statistics: Statistics from a file; `None` if there are only images.
    """

    path: str
    images: RawImages | None = None
    statistics: FeatureSummary | None = None

    @classmethod
    def open(cls, path: str, image_args: RawImageArguments) -> "Reference":
        """Open a file of statistics, or images in any form that `open_images` takes.

        Raises:
            FileNotFoundError: If a path does not exist.
            ValueError: If nothing can be read there.
        """
        if not has_statistics(Path(path)):
            return cls(path, images=open_images(path, image_args))
        return cls(path, _images_beside(Path(path)), load_summary(Path(path)))

    def check(self, metrics: Sequence[str], extractor: FeatureExtractor) -> None:
        """Refuse statistics of another extractor, or without what the metrics need.

        Raises:
            ValueError: If they differ; names what differs or is missing.
        """
        if self.statistics is not None:
            check_reference(self.path, self.statistics, metrics, extractor, has_images=self.images is not None)

    def dims(self, extractor: FeatureExtractor) -> dict[str, int]:
        """Return the dimension of each kind of features that the extractor gives or has given."""
        if self.statistics is not None:
            return {kind: len(gaussian.mean) for kind, gaussian in self.statistics.statistics.items()}
        return measure_dims(extractor, self.images[0].shape) if self.images is not None else {}

    def count_features(self, limit: int) -> int | None:
        """Return the number of features to compare with, of at most `limit` images; `None` for no features."""
        if self.statistics is not None and self.statistics.features is not None:
            return len(self.statistics.features)
        return min(limit, len(self.images)) if self.images is not None else None

    def summarize(
        self, extractor: FeatureExtractor, statistics: Sequence[str], num_features: int, **kwargs: Any
    ) -> FeatureSummary | None:
        """Return the statistics and features asked for, from the file if it has them; see `extraction.summarize`."""
        kwargs = {"desc": "Reference", **kwargs}
        if self.images is None:
            return self.statistics
        if self.statistics is None:
            return summarize(self.images, extractor, statistics, num_features, **kwargs)
        if num_features and self.statistics.features is None:
            beside = summarize(self.images, extractor, (), num_features, **kwargs)
            self.statistics.features = beside.features if beside else None
        return self.statistics


def _images_beside(path: Path) -> NpzImages | None:
    """Open the images that ADM's reference files hold beside the statistics."""
    return NpzImages(path) if path.suffix.lower() == ".npz" and "arr_0" in names_in_npz(path) else None


@torch.no_grad()
def measure_dims(extractor: FeatureExtractor, shape: Sequence[int]) -> dict[str, int]:
    """Return the dimension of each kind of features that an extractor gives for images of a shape.

    Args:
        extractor: The extractor.
        shape: Height, width and channels.

    Raises:
        ValueError: If it does not take such images.
    """
    height, width, channels = shape
    what = f"images of {width}x{height} pixels and {channels} channel(s)"
    with refused_as(f"The extractor {extractor.name} does not take {what}"):
        prepared = extractor.prepare(np.full((height, width, channels), 128, np.uint8))
        features = extractor(prepared[None].to(PartialState().device))
    dims = {kind: values.shape[1] for kind, values in features.items()}
    if max(dims.values()) > MAX_DIM:
        raise ValueError(f"The extractor {extractor.name} gives {max(dims.values())} dimensions; at most {MAX_DIM}.")
    return dims


def _subset(count, num_features):
    if num_features is None or num_features >= count:
        return np.arange(count)
    return np.sort(np.random.RandomState(SUBSET_SEED).choice(count, num_features, replace=False))


def _features_in_order(images, extractor, kinds, num_workers, state) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Iterate over batches of features in the order of the images: index of the first image, and the features."""
    size = extractor.batch_size
    batches = [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
    rounds = -(-len(batches) // state.num_processes)
    # Gathering needs all processes: those without a batch in the last round extract the last batch again.
    mine = [min(r * state.num_processes + state.process_index, len(batches) - 1) for r in range(rounds)]
    loader = DataLoader(
        _Prepared(images, extractor),
        batch_sampler=[list(batches[batch]) for batch in mine],
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=ignore_ctrl_c,
    )
    for r, prepared in enumerate(loader):
        for item in prepared:
            if isinstance(item, CorruptImageError):
                raise item
        prepared += [prepared[-1]] * (size - len(prepared))
        with _exact_arithmetic(), torch.no_grad():
            features = extractor(torch.stack(prepared).to(state.device))
        features = {kind: gather(features[kind].contiguous()) for kind in sorted(kinds)}
        for process in range(state.num_processes):
            batch = r * state.num_processes + process
            if batch < len(batches):
                indices = batches[batch]
                rows = slice(process * size, process * size + len(indices))
                yield indices.start, _finite({kind: features[kind][rows] for kind in kinds}, images, indices.start)


def _finite(features, images, start):
    for kind, values in features.items():
        bad = (~torch.isfinite(values)).any(dim=1).nonzero()
        if len(bad):
            raise ValueError(f"The {kind} features of {images.name_of(start + int(bad[0]))} are not finite.")
    return features


def ignore_ctrl_c(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the main process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Prepared(torch.utils.data.Dataset):
    """Images as the extractor wants them; errors are items, because a worker would wrap them in its own traceback."""

    def __init__(self, images: RawImages, extractor: FeatureExtractor):
        self.images, self.prepare = images, extractor.prepare
        self.shape = images[0].shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | CorruptImageError:
        try:
            image = self.images[index]
            if image.dtype != np.uint8 or image.shape != self.shape:
                raise ValueError(f"it is {image.dtype} of shape {image.shape}, not uint8 of shape {self.shape}")
            return self.prepare(image)
        except CorruptImageError as error:
            return error
        except (ValueError, OSError, EOFError) as error:
            return CorruptImageError(f"Cannot use {self.images.name_of(index)}: {error}")


@contextmanager
def _exact_arithmetic():
    """Turn off TF32 on CUDA, which is cuDNN's default and has 10 bits of precision, and fix the algorithm."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
