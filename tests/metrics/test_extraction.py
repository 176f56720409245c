import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from sdt_diffusion.data import CorruptImageError
from sdt_diffusion.data.raw_images import RawImages
from sdt_diffusion.metrics.extraction import measure_dims, summarize
from sdt_diffusion.metrics.extractors import build_extractor
from sdt_diffusion.metrics.extractors.base import FeatureExtractor
from tests.metrics.test_inception_score import inception_score


class Images(RawImages):
    """Random images; `bad` maps an index to an error."""

    name = "random"

    def __init__(self, count, bad=()):
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 2, 3, 3), dtype=np.uint8)
        self.bad = dict(bad)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        if index in self.bad:
            raise self.bad[index]
        return self.pixels[index]


class Network(FeatureExtractor):
    """Pixels as pooled features and logits; remembers the sizes of its batches."""

    name, resize, fingerprint = "network", "none", "0123"
    provides = frozenset({"pool", "logits"})
    batch_size = 8

    def __init__(self, nan_at=None):
        self.sizes, self.nan_at = [], nan_at

    def prepare(self, image):
        return torch.from_numpy(image.reshape(-1)).float()

    def __call__(self, batch):
        self.sizes.append(len(batch))
        features = batch.clone()
        if self.nan_at is not None and len(self.sizes) == 2:
            features[self.nan_at] = torch.nan
        return {"pool": features, "logits": batch / 50}


def features(images):
    return torch.from_numpy(images.pixels.reshape(len(images), -1)).float()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_summary_is_that_of_all_features_in_order(tmp_path, num_workers):
    images = Images(29)
    found = summarize(images, Network(), ("pool",), None, 3, tmp_path, num_workers)
    assert np.array_equal(found.features[:], features(images))
    np.testing.assert_allclose(found.statistics["pool"].covariance, np.cov(features(images).numpy(), rowvar=False))
    assert found.inception_score == pytest.approx(inception_score(features(images) / 50, 3), rel=1e-12)
    assert found.provenance == {
        **{"images": "random", "count": 29, "shape": [2, 3, 3], "format": "none"},
        "preparation": "none",
        **{"extractor": "network", "resize": "none", "weights": "0123"},
    }


def test_the_network_sees_full_batches_only():
    network = Network()
    summarize(Images(17), network)
    assert network.sizes == [8, 8, 8]


def test_a_subset_of_features_is_random_and_in_order(tmp_path):
    images = Images(29)
    found = summarize(images, Network(), (), 7, feature_folder=tmp_path).features[:]
    rows = [int(np.flatnonzero((features(images).numpy() == row).all(axis=1))[0]) for row in found]
    assert len(rows) == 7
    assert rows == sorted(set(rows))
    assert rows != list(range(7))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_is_named(num_workers):
    images = Images(29, {20: CorruptImageError("Cannot use images/20.png: broken")})
    with pytest.raises(CorruptImageError, match=r"^Cannot use images/20.png: broken$"):
        summarize(images, Network(), num_workers=num_workers)


def test_an_image_whose_features_are_not_finite_is_named():
    with pytest.raises(ValueError, match="The pool features of image 13 of random are not finite"):
        summarize(Images(29), Network(nan_at=5))


def test_an_image_the_extractor_does_not_take_is_named():
    class Picky(Network):
        def prepare(self, image):
            raise ValueError("too blue")

    with pytest.raises(CorruptImageError, match="Cannot use image 0 of random: too blue"):
        summarize(Images(5), Picky())


def test_features_leave_no_file_even_when_extraction_fails(tmp_path):
    with pytest.raises(CorruptImageError):
        summarize(Images(29, {20: CorruptImageError("broken")}), Network(), (), None, feature_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_features": -1}, "num_features must be at least 0 and at most 1000000, not -1"),
        ({"inception_splits": 30}, "inception_splits must be at least 0 and at most 29, not 30"),
        ({"num_workers": -2}, "num_workers must be at least 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        summarize(Images(29), Network(), **values)


def test_images_of_another_size_or_type_are_named():
    for change, message in (
        (lambda pixels: pixels[:1], r"it is uint8 of shape \(1, 3, 3\), not uint8 of shape \(2, 3, 3\)"),
        (lambda pixels: pixels / 255, "it is float64 of shape"),
    ):
        images = Images(29)
        images.pixels = [*images.pixels[:20], change(images.pixels[20]), *images.pixels[21:]]
        with pytest.raises(CorruptImageError, match=f"Cannot use image 20 of random: {message}"):
            summarize(images, Network())


def test_one_image_is_too_few_before_it_is_looked_at():
    network = Network()
    with pytest.raises(ValueError, match="random: a covariance needs at least 2 images, not 1"):
        summarize(Images(1), network)
    assert network.sizes == []


def test_dimensions_are_known_before_the_work():
    assert measure_dims(Network(), (2, 3, 3)) == {"pool": 18, "logits": 18}
    with pytest.raises(ValueError, match="The extractor pixels does not take images of 64x64 pixels and 3 channel"):
        measure_dims(build_extractor("pixels"), (64, 64, 3))


def test_ctrl_c_is_left_to_the_main_process():
    class Interrupted(Images):
        def __getitem__(self, index):
            if multiprocessing.parent_process() is not None:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    assert summarize(Interrupted(29), Network(), num_workers=1).provenance["count"] == 29
