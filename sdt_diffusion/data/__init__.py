"""Images and labels from the formats that `datasets` reads."""

from .images import CorruptImageError, DataArguments, LabelledImages, load_images
from .stream import ShuffledStream

__all__ = ["CorruptImageError", "DataArguments", "LabelledImages", "ShuffledStream", "load_images"]
