import numpy as np
import pytest

from sdt_diffusion.data import DataArguments, load_images
from sdt_diffusion.evaluation.label_accuracy import svm_label_accuracy


@pytest.fixture(scope="module")
def digits():
    images = load_images(DataArguments(), default_resolution=8)
    pixels = np.stack([image.permute(1, 2, 0).numpy() for image, _ in images.__getitems__(range(len(images)))])
    return images, pixels / 2 + 0.5


def test_real_images_are_their_labels_and_shuffled_labels_are_chance(digits):
    images, pixels = digits
    assert svm_label_accuracy(images, pixels, images.labels) > 0.99
    wrong = np.random.default_rng(0).permutation(images.labels)
    assert svm_label_accuracy(images, pixels, wrong) == pytest.approx(0.1, abs=0.03)


def test_samples_of_another_size_are_refused(digits):
    with pytest.raises(ValueError, match=r"2 labels and samples of shape \(3, 8, 8, 1\)"):
        svm_label_accuracy(digits[0], np.zeros((3, 8, 8, 1)), [0, 1])
    with pytest.raises(ValueError, match=r"do not fit real images \(1797, 8, 8, 1\)"):
        svm_label_accuracy(digits[0], np.zeros((2, 16, 16, 1)), [0, 1])
