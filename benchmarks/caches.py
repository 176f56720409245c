"""Measure what diffusers' caches of earlier steps save, and what they do to images and their FD.

    python benchmarks/caches.py --model outputs/digits --reference digits --extractor pixels

Prints a table: how many times less CPU time sampling takes than without a cache, the mean difference of pixels, 0 to
1, from the same samples without a cache, and the FD; fewer steps without a cache are there for comparison. CPU time
depends less on what else the machine does than the clock does.
"""

import argparse
import contextlib
import io
import logging
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from sdt_diffusion import SDTPipeline, swap_scheduler
from sdt_diffusion.data.raw_images import RawImageArguments, RawImages
from sdt_diffusion.metrics.comparison import frechet_distance
from sdt_diffusion.metrics.extraction import Reference, summarize
from sdt_diffusion.metrics.extractors import ExtractorArguments, FeatureExtractor
from sdt_diffusion.sampling.generate import generate, stack_samples


class Samples(RawImages):
    """Images in memory, as uint8."""

    def __init__(self, images: np.ndarray):
        self.images, self.name = (images * 255).round().astype(np.uint8), "samples"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]


def caches(pipe: SDTPipeline, steps: int, ratios: Sequence[float]) -> dict[str, Any]:
    """Return the caches to measure; `ratios` are MagCache's."""
    now = {"current_timestep_callback": lambda: pipe.current_timestep}
    some, all_early = ({"spatial_attention_timestep_skip_range": each} for each in ((100, 900), (-1, 800)))
    skip = {"spatial_attention_block_skip_range": 2}
    null_class = {"unconditional_batch_skip_range": 3, "unconditional_batch_timestep_skip_range": (-1, 800)}
    return {
        "TaylorSeer, lite, `cache_interval` 3": TaylorSeerCacheConfig(cache_interval=3, use_lite_mode=True),
        "TaylorSeer, lite, `cache_interval` 2": TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True),
        "TaylorSeer, `cache_interval` 3": TaylorSeerCacheConfig(cache_interval=3),
        "FasterCache, attention from -1 to 800": FasterCacheConfig(**skip, **all_early, **null_class, **now),
        "pyramid attention broadcast": PyramidAttentionBroadcastConfig(**skip, **some, **now),
        "first block, threshold 0.05": FirstBlockCacheConfig(threshold=0.05),
        "first block, threshold 0.1": FirstBlockCacheConfig(threshold=0.1),
        "first block, threshold 0.2": FirstBlockCacheConfig(threshold=0.2),
        "MagCache, calibrated, threshold 0.06": MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios),
    }


@contextlib.contextmanager
def logged() -> Iterator[io.StringIO]:
    """Collect what diffusers prints and logs."""
    text, logger = io.StringIO(), logging.getLogger("diffusers")
    handler, level = logging.StreamHandler(text), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(text):
            yield text
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--extractor", default="inception")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = SDTPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    labels = [index % pipe.transformer.config.num_classes for index in range(args.num_samples)]
    extractor = ExtractorArguments(extractor=args.extractor).build("cpu")
    expected = Reference.open(args.reference, RawImageArguments()).summarize(extractor, ("pool",), 0)

    def sample(steps: int = args.steps, count: int = args.num_samples) -> tuple[np.ndarray, float]:
        options = {"guidance_scale": args.guidance_scale, "num_inference_steps": steps, "progress": False}
        start = time.process_time()
        images = stack_samples(generate(pipe, labels[:count], batch_size=250, output_type="np", **options))
        return images, time.process_time() - start

    def show(name: str, images: np.ndarray, seconds: float) -> None:
        distance = fd(images, extractor, expected)
        print(f"| {name} | {plain / seconds:.2f} | {np.abs(images - exact).mean():.4f} | {distance:.3f} |", flush=True)

    sample(2)
    exact, plain = sample()
    print("| cache | speed | difference | FD |\n|---|---|---|---|")
    show("none", exact, plain)
    with logged() as text:
        pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=args.steps, calibrate=True))
        sample(count=50)
        pipe.transformer.disable_cache()
    found = re.findall(r"\[(1\.0[\d., e+-]*)\]", text.getvalue())[-1]
    ratios = [float(ratio) for ratio in found.split(",")]
    for name, config in caches(pipe, args.steps, ratios).items():
        pipe.transformer.enable_cache(config)
        show(name, *sample())
        pipe.transformer.disable_cache()
    for steps in (17, 12):
        show(f"no cache, {steps} steps", *sample(steps))
    pipe.scheduler = swap_scheduler(pipe.scheduler, "UniPCMultistepScheduler")
    show("no cache, 10 steps of UniPC", *sample(10))


def fd(images: np.ndarray, extractor: FeatureExtractor, expected: Any) -> float:
    """Return the FD of images from a reference."""
    found = summarize(Samples(images), extractor)
    assert found is not None  # there is one process
    return frechet_distance(found.statistics["pool"], expected.statistics["pool"])


if __name__ == "__main__":
    main()
