"""Labeled images in the formats that `datasets` reads, cached latents, and a shuffled stream of either."""

from .decoding import CorruptImageError
from .images import DataArguments, LabeledImages, load_images
from .latents.cache import LatentCache
from .stream import RandomFlip, RandomMirror, SeededTransform, ShuffledStream

__all__ = [
    "CorruptImageError",
    "DataArguments",
    "LabeledImages",
    "LatentCache",
    "RandomFlip",
    "RandomMirror",
    "SeededTransform",
    "ShuffledStream",
    "load_images",
]
