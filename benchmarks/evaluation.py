"""Measure the Frechet distance against its peers, and the peak memory of evaluation against the number of images.

The contestants take turns in one process; compare medians and ratios. Peak memory is measured for all metrics in a new
process for each number of images, over its memory after importing, with a stand-in for Inception that has the
dimensions of its features and little of its cost.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --counts 1000 50000      # precision and recall of 50,000 images take long
"""

import argparse
import contextlib
import io
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from scipy import linalg
from tqdm import tqdm

from sdt_diffusion.data.raw_images import RawImages
from sdt_diffusion.metrics.comparison import frechet_distance
from sdt_diffusion.metrics.extraction import summarize
from sdt_diffusion.metrics.extractors import FeatureExtractor
from sdt_diffusion.metrics.features import GaussianStatistics
from sdt_diffusion.metrics.registry import METRICS, compute_metrics

BASELINE = "SciPy's sqrtm (clean-fid)"


def by_sqrtm(first, second):
    """Return the Frechet distance by the square root of a matrix."""
    difference = first.mean - second.mean
    root = linalg.sqrtm(first.covariance @ second.covariance)
    return difference @ difference + np.trace(first.covariance + second.covariance - 2 * root.real)


def by_eigvals(first, second):
    """Return the Frechet distance by the eigenvalues of a matrix that is not symmetric."""
    difference = first.mean - second.mean
    eigenvalues = np.linalg.eigvals(first.covariance @ second.covariance).astype(complex)
    return (
        difference @ difference + np.trace(first.covariance + second.covariance) - 2 * np.sqrt(eigenvalues).real.sum()
    )


CONTESTANTS = {BASELINE: by_sqrtm, "NumPy's eigvals (torch-fidelity)": by_eigvals, "ours": frechet_distance}


def spread_features(count, dim, seed):
    """Draw features whose covariance has eigenvalues over six orders of magnitude, as Inception's."""
    random = np.random.default_rng(seed)
    rotation = linalg.qr(random.standard_normal((dim, dim)))[0]
    return random.standard_normal((count, dim)) * np.exp(-7 * np.arange(dim) / dim) @ rotation + 0.01 * seed


def benchmark_frechet(dim, rounds):
    """Print times and values of the Frechet distances, below and at full rank."""
    print(f"| Frechet distance, D = {dim} | images | s | times as fast | value |\n|---|---|---|---|---|")
    for count in (dim // 2, 3 * dim):
        features = [spread_features(count, dim, seed) for seed in (0, 1)]
        pair = [GaussianStatistics(f.mean(0), np.cov(f, rowvar=False), count) for f in features]
        times = {name: [] for name in CONTESTANTS}
        values = {}
        for _ in tqdm(range(rounds), desc=f"{count} images", leave=False):
            for name, distance in CONTESTANTS.items():
                start = time.perf_counter()
                values[name] = distance(*map(replace, pair))  # copies, because ours caches roots
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        for name, median in medians.items():
            faster = medians[BASELINE] / median
            print(f"| {name} | {count} | {median:.2f} | {faster:.1f} | {values[name]:.10g} |", flush=True)


class RandomImages(RawImages):
    """Images drawn on access."""

    name = "random images"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)


class StandIn(FeatureExtractor):
    """Random projections of pixels to the dimensions of Inception's features."""

    name, resize, fingerprint = "stand-in", "none", "none"
    provides = frozenset({"pool", "spatial", "logits"})

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        dims = {"pool": 2048, "spatial": 2023, "logits": 1008}
        self.maps = {kind: torch.randn(192, dim, generator=generator) / 14 for kind, dim in dims.items()}

    def prepare(self, image):
        """Return the pixels of an image in 0 to 1."""
        return torch.from_numpy(image.reshape(-1)).float() / 255

    def __call__(self, batch):
        """Return random projections."""
        return {kind: (batch @ projection).relu() for kind, projection in self.maps.items()}


def peak_memory(count, threads):
    """Return peak memory in MiB over imports, and seconds, of an evaluation in a new process."""
    queue = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=_evaluate, args=(queue, count, threads))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"Measuring {count} images ended with exit code {process.exitcode}.")
    return queue.get()


def _evaluate(queue, count, threads):
    torch.set_num_threads(threads)
    PartialState(cpu=True)
    extractor = StandIn()
    before = _resident_kib("VmRSS")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, contextlib.redirect_stderr(io.StringIO()):
        sides = [
            summarize(RandomImages(count), extractor, ("pool", "spatial"), limit, 10, Path(folder))
            for limit in (None, 10_000)
        ]
        compute_metrics(list(METRICS), *sides)
    queue.put(((_resident_kib("VmHWM") - before) / 1024, time.perf_counter() - start))


def _resident_kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no_frechet", action="store_true")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.no_frechet:
        benchmark_frechet(args.dim, args.rounds)
    print("\n| images | peak MiB over imports | s |\n|---|---|---|")
    for count in args.counts:
        peak, seconds = peak_memory(count, args.threads)
        print(f"| {count} | {peak:.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
