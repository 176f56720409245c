"""Labelled images from the formats that `datasets` reads, latents of a cache, and the stream of either."""

from .decoding import CorruptImageError
from .images import DataArguments, LabelledImages, load_images
from .latents.cache import LatentCache
from .stream import RandomFlip, RandomMirror, SeededTransform, ShuffledStream

__all__ = [
    "CorruptImageError",
    "DataArguments",
    "LabelledImages",
    "LatentCache",
    "RandomFlip",
    "RandomMirror",
    "SeededTransform",
    "ShuffledStream",
    "load_images",
]
