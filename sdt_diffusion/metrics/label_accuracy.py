"""Whether a classifier that has only seen real images agrees with the labels that samples were made for."""

from collections.abc import Sequence

import numpy as np

from ..data import LabelledImages


def svm_label_accuracy(real: LabelledImages, samples: np.ndarray, labels: Sequence[int]) -> float:
    """Fraction of samples that an RBF support vector machine, trained on the pixels of real images, gives their label.

    A measure for small images and data sets, such as the digits.

    Args:
        real: The real images, all of which are read into memory.
        samples: Samples of the same size, shape (n, height, width, channels), 0 to 1.
        labels: The labels they were made for.

    Raises:
        ValueError: If the samples are not of the real images' size, or not as many as the labels.
    """
    from sklearn.svm import SVC

    pixels = np.stack([image.permute(1, 2, 0).numpy() for image, _ in real.__getitems__(range(len(real)))]) / 2 + 0.5
    if samples.shape[1:] != pixels.shape[1:] or len(samples) != len(labels):
        raise ValueError(
            f"{len(labels)} labels and samples of shape {samples.shape} do not fit real images {pixels.shape}."
        )
    classifier = SVC(kernel="rbf", C=10.0, gamma="scale")
    classifier.fit(pixels.reshape(len(pixels), -1), real.labels)
    return float((classifier.predict(samples.reshape(len(samples), -1)) == np.asarray(labels)).mean())
