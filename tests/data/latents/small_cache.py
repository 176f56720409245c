"""Small caches of latents."""

import torch

from sdt_diffusion.data.latents.writer import CacheWriter

SHAPE = (4, 3, 3)
READ_SETTINGS = {"resolution": 6, "image_mode": "RGB", "scaling_factor": 1.0, "shift_factor": 0.0}


def write_cache(folder, counts=(4, 4, 2), class_names=("ant", "bee", "cat"), **settings):
    """A cache of random moments in shards of some counts; gives all moments and labels."""
    generator = torch.Generator().manual_seed(0)
    made = {**READ_SETTINGS, "dtype": "float16", "class_names": list(class_names), **settings}
    writer = CacheWriter(folder, {**made, "num_rows": sum(counts)})
    writer.claim()
    moments = torch.randn(sum(counts), 2, 2, *SHAPE, generator=generator).half()
    labels = torch.arange(sum(counts)) % len(class_names)
    for shard, (m, l) in enumerate(zip(moments.split(counts), labels.split(counts), strict=True)):
        writer.save(shard, m, l)
    writer.finish("a-vae", SHAPE, sum(counts))
    return moments, labels
