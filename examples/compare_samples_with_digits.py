"""Compare samples with real digits, pixel by pixel: `python examples/compare_samples_with_digits.py [PIPELINE]`.

PIPELINE is the folder of a pipeline trained on the digits, such as outputs/digits; without it a small random one is
used. The metrics are those of eval/fid.py, with pixels in place of Inception's features.
"""

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from sdt_diffusion import SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.data.raw_images import FolderImages, RawImageArguments, open_images
from sdt_diffusion.metrics.extraction import summarize
from sdt_diffusion.metrics.extractors import build_extractor
from sdt_diffusion.metrics.registry import compute_metrics

if __name__ == "__main__":
    if len(sys.argv) > 1:
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
    else:
        model = SDTTransformer2DModel.from_preset("SDT-digits", num_layers=1, num_classes=10)
        pipe = SDTPipeline(model, FlowMatchEulerDiscreteScheduler())

    folder = Path(tempfile.mkdtemp())
    labels = [index % 10 for index in range(100)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    for index, image in enumerate(pipe(labels, generator=generators, num_inference_steps=10).images):
        image.save(folder / f"{index:03d}.png")

    digits, samples = open_images("digits", RawImageArguments()), FolderImages(folder, image_mode="L")
    extractor = build_extractor("pixels")
    summaries = [summarize(images, extractor, num_features=None) for images in (samples, digits)]
    print(compute_metrics(["fid", "precision", "recall"], *summaries))
