"""Whether a classifier that has only seen real images agrees with the labels that samples were made for."""

import numpy as np


def svm_label_accuracy(
    real_images: np.ndarray, real_labels: np.ndarray, images: np.ndarray, labels: np.ndarray
) -> float:
    """Fraction of samples that an RBF support vector machine, trained on the pixels of real images, gives their label.

    A measure for small images and data sets, such as the digits.

    Args:
        real_images: Real images of any shape (n, ...), 0 to 1.
        real_labels: Their labels, shape (n,).
        images: Samples of the same shape but for n.
        labels: The labels they were made for.
    """
    from sklearn.svm import SVC

    classifier = SVC(kernel="rbf", C=10.0, gamma="scale")
    classifier.fit(real_images.reshape(len(real_images), -1), real_labels)
    return float((classifier.predict(images.reshape(len(images), -1)) == labels).mean())
