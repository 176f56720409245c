"""Measure loading latents: a cache against a file for every image, and memory over a pass of several GB.

Both are made of random numbers in a temporary folder, and go through the stream and the DataLoader of training. The
contestants take turns; compare medians and ratios. Memory is the resident memory of the process that reads, a new one
or its worker, at the quarters of a pass.

    python benchmarks/loader.py
    python benchmarks/loader.py --gigabytes 1 --rounds 3
"""

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from sdt_diffusion.data import LatentCache, RandomMirror, ShuffledStream
from sdt_diffusion.data.latents.writer import CacheWriter

SHAPE, BATCH_SIZE = (4, 32, 32), 256
BASELINE = "a .npy file for every image"


class FilePerImage:
    """A file for every image, without mirror images, as fast-DiT has it."""

    def __init__(self, folder, count):
        self.folder, self.count = folder, count

    def __len__(self):
        return self.count

    def __getitems__(self, indices):
        return [(torch.from_numpy(np.load(self.folder / f"{index}.npy")), index % 1000) for index in indices]


class MappedCache(LatentCache):
    """A cache whose files are mapped into memory, by the safetensors library."""

    def __init__(self, folder, mirrors):
        super().__init__(folder, mirrors)
        self.slices = [safe_open(path, framework="pt").get_slice("moments") for path in self._paths]

    def __getitems__(self, indices):
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        places = [index - int(self._starts[shard]) for index, shard in zip(indices, shards, strict=True)]
        moments = [self.slices[shard][place] for shard, place in zip(shards, places, strict=True)]
        return list(zip(moments, self.labels[indices].tolist(), strict=True))


def make_cache(folder: Path, count: int, shard_size: int) -> None:
    """Write a cache of random latents."""
    random = np.random.default_rng(0)
    settings = {"resolution": 256, "image_mode": "RGB", "scaling_factor": 1.0, "shift_factor": 0.0}  # without a VAE
    settings |= {"dtype": "float16", "num_rows": count}
    writer = CacheWriter(folder, {**settings, "class_names": [str(label) for label in range(1000)]})
    writer.claim()
    for shard, start in enumerate(tqdm(range(0, count, shard_size), desc="Writing", leave=False)):
        size = min(shard_size, count - start)
        moments = torch.from_numpy(random.standard_normal((size, 2, 2, *SHAPE), dtype=np.float32)).half()
        writer.save(shard, moments, torch.arange(start, start + size) % 1000)
    writer.finish(None, SHAPE, count)


def make_files(folder: Path, count: int) -> None:
    """Write a file for every image."""
    folder.mkdir()
    for index in tqdm(range(count), desc="Writing", leave=False):
        np.save(folder / f"{index}.npy", np.random.default_rng(index).standard_normal(SHAPE, dtype=np.float32))


def batches(images, augment, num_workers: int, num_images: int) -> Iterator[list[torch.Tensor]]:
    """Iterate over batches as the training loop gets them."""
    stream = ShuffledStream(images, 0, augment, start=0, stop=num_images)
    return iter(DataLoader(stream, batch_size=BATCH_SIZE, num_workers=num_workers))


def latents_per_second(images, augment, num_workers, num_batches) -> float:
    """Return the speed after the first batches, for which workers have to be started."""
    warm_up = 2 * num_workers + 1
    loader = batches(images, augment, num_workers, BATCH_SIZE * (warm_up + num_batches))
    for _ in itertools.islice(loader, warm_up):
        pass
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in loader)
    return count / (time.perf_counter() - start)


def benchmark_speed(folder: Path, num_files: int, args) -> None:
    """Print latents per second of the contestants."""
    cache = LatentCache(folder / "cache", mirrors=True)
    contestants = {
        BASELINE: (FilePerImage(folder / "files", num_files), None),
        "cache, one mirror": (LatentCache(folder / "cache"), None),
        "cache, random mirrors": (cache, RandomMirror(0)),
        "cache mapped by safetensors, random mirrors": (MappedCache(folder / "cache", mirrors=True), RandomMirror(0)),
    }
    speeds = {(name, workers): [] for name in contestants for workers in args.workers}
    for _ in tqdm(range(args.rounds), desc="Rounds", leave=False):
        for name, workers in speeds:
            speeds[name, workers].append(latents_per_second(*contestants[name], workers, args.batches))
    print("| | workers | latents/s | times as fast |\n|---|---|---|---|")
    for (name, workers), values in speeds.items():
        median = statistics.median(values)
        faster = median / statistics.median(speeds[BASELINE, workers])
        print(f"| {name} | {workers} | {median:,.0f} | {faster:.1f} |", flush=True)


def benchmark_memory(folder: Path) -> None:
    """Print the resident memory of the process that reads, after the first batch and at the quarters of a pass."""
    print("\n| MiB after | | a batch | 25% | 50% | 75% | 100% of the cache |\n|---|---|---|---|---|---|---|")
    contestants = [
        ("cache", LatentCache, 0),
        ("cache", LatentCache, 1),
        ("cache mapped by safetensors", MappedCache, 0),
    ]
    for name, kind, num_workers in contestants:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh:  # nothing is left of the contestants before
            measured = fresh.submit(resident_over_a_pass, kind, folder / "cache", num_workers).result()
        what = "worker" if num_workers else "process"
        print(f"| {name} | {what} | " + " | ".join(f"{value:.0f}" for value in measured) + " |", flush=True)


def resident_over_a_pass(kind, folder: Path, num_workers: int) -> list[float]:
    """Return resident MiB of the process that reads, which is the worker if there is one."""
    torch.set_num_threads(1)
    images = kind(folder, mirrors=True)
    num_batches = len(images) // BATCH_SIZE
    at = {1, *(quarter * num_batches // 4 for quarter in range(1, 5))}
    measured = []
    for number, _ in enumerate(batches(images, RandomMirror(0), num_workers, num_batches * BATCH_SIZE), 1):
        if number in at:
            children = psutil.Process().children()
            reading = children[0] if num_workers else psutil.Process()
            measured.append(reading.memory_info().rss / 2**20)
    return measured


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4, help="Size of the cache.")
    parser.add_argument("--files", type=int, default=20_000, help="Number of .npy files.")
    parser.add_argument("--batches", type=int, default=60, help="Batches of a round.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="Where to make the temporary folder.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    count = int(args.gigabytes * 1e9 / (4 * np.prod(SHAPE) * 2))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_cache(Path(folder) / "cache", count, shard_size=4096)
        make_files(Path(folder) / "files", args.files)
        benchmark_speed(Path(folder), args.files, args)
        benchmark_memory(Path(folder))


if __name__ == "__main__":
    main()
