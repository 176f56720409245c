"""Images and labels from the formats that `datasets` reads."""

from .augmentation import RandomFlip, SeededTransform
from .decoding import CorruptImageError
from .images import DataArguments, LabelledImages, load_images
from .stream import ShuffledStream

__all__ = [
    "CorruptImageError",
    "DataArguments",
    "LabelledImages",
    "RandomFlip",
    "SeededTransform",
    "ShuffledStream",
    "load_images",
]
