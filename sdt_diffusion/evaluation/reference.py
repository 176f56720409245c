"""What samples are compared with: images, statistics of images, or both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.raw_images import NpzImages, RawImageArguments, RawImages, open_images, refuse_preparation
from ..metrics.evaluate import check_reference
from ..metrics.extraction import summarise
from ..metrics.extractors import FeatureExtractor
from ..metrics.summary import FeatureSummary, has_statistics, load_summary


@dataclass
class Reference:
    """A reference before its features are known.

    Args:
        path: As it was named.
        images: Its images; `None` if there are only statistics.
        statistics: What a file says of them; `None` if there are only images.
    """

    path: str
    images: RawImages | None = None
    statistics: FeatureSummary | None = None

    @classmethod
    def open(cls, path: str, image_args: RawImageArguments) -> "Reference":
        """Opens a file of statistics, or images in any form that `open_images` takes.

        Raises:
            FileNotFoundError: If a path does not exist.
            ValueError: If nothing can be read there.
        """
        if not has_statistics(Path(path)):
            return cls(path, images=open_images(path, image_args, "--reference"))
        refuse_preparation(image_args, f"--reference {path}")
        return cls(path, _images_beside(Path(path)), load_summary(Path(path)))

    def check(self, metrics: Sequence[str], extractor: FeatureExtractor) -> None:
        """Refuses statistics of another extractor, or without what the metrics need.

        Raises:
            ValueError: Says what differs or is missing.
        """
        if self.statistics is not None:
            check_reference(self.path, self.statistics, metrics, extractor, has_images=self.images is not None)

    def count_features(self, limit: int) -> int | None:
        """How many features there will be, of at most `limit` images; `None` for none."""
        if self.statistics is not None and self.statistics.features is not None:
            return len(self.statistics.features)
        return min(limit, len(self.images)) if self.images is not None else None

    def summarise(
        self, extractor: FeatureExtractor, statistics: Sequence[str], num_features: int, **kwargs: Any
    ) -> FeatureSummary | None:
        """The statistics and features asked for, from the file where it has them; see `extraction.summarise`."""
        kwargs = {"desc": "Reference", **kwargs}
        if self.statistics is None:
            return summarise(self.images, extractor, statistics, num_features, **kwargs)
        if num_features and self.statistics.features is None:
            beside = summarise(self.images, extractor, (), num_features, **kwargs)
            self.statistics.features = beside.features if beside else None
        return self.statistics


def _images_beside(path):
    """ADM's reference files hold images beside the statistics."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            if "arr_0" in archive.files:
                return NpzImages(path)
    return None
