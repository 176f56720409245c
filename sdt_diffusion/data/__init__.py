"""Images and labels from the formats that `datasets` reads."""

from .augmentation import RandomFlip, SeededTransform
from .images import CorruptImageError, DataArguments, LabelledImages, load_images
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
