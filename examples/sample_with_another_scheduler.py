"""Sample the same noise with several schedulers: `python examples/sample_with_another_scheduler.py [PIPELINE]`.

PIPELINE is the folder of a trained pipeline, such as outputs/digits; without it a small random one is made and saved
first. The images go to schedulers.png, a row for each scheduler.
"""

import sys
import tempfile

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from sdt_diffusion import SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.plots import image_grid

SCHEDULERS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler"]

if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    if len(sys.argv) == 1:
        torch.manual_seed(0)
        model = SDTTransformer2DModel.from_preset("SDT-digits", num_layers=1, num_classes=10)
        SDTPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)

    pipe = DiffusionPipeline.from_pretrained(folder)
    labels, images, texts = [0, 1, 2, 3], [], []
    for name in SCHEDULERS:
        pipe.swap_scheduler(name)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
        images += pipe(labels, generator=generators, num_inference_steps=4).images
        texts += [name.removesuffix("Scheduler")[:12]] * len(labels)
    image_grid(images, texts, columns=len(labels)).save("schedulers.png")
    print(f"Saved {len(images)} images to schedulers.png.")
