"""Match the classes of a data set with the labels of a model."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..data import LabeledImages
from ..sdt.class_names import labels_of_names

Matching = Literal["auto", "name", "index"]


def match_labels(
    class_names: Sequence[str], id2label: dict[int, str], matching: Matching = "auto"
) -> tuple[list[int], Literal["name", "index"]]:
    """Find the model's label for each class of a data set.

    By name where the model has all the names. A name of the model may hold several words for the class, separated by
    commas; a model without names (transformers' "LABEL_0", "LABEL_1" ...) has the numbers for names. By index where
    the model lacks names of the data set and one of the two has none: the data set's classes are the numbers 0, 1, 2
    ..., or they are words and the model has no names.

    Args:
        class_names: Names of the data set's classes, in the order of its labels.
        id2label: The model's names.
        matching: "name" or "index" to allow that way only; "auto" for the rules above.

    Returns:
        The labels, and how they were found.

    Raises:
        ValueError: If the model lacks some of the names, or a name means several of its labels, or several names one.
    """
    named = any(name != f"LABEL_{label}" for label, name in id2label.items())
    labels_of_name = labels_of_names(id2label if named else {label: str(label) for label in id2label})
    missing = [name for name in class_names if name not in labels_of_name]
    numbered = list(class_names) == [str(i) for i in range(len(class_names))]
    either_nameless = numbered or not (named or all(name.isdecimal() for name in class_names))
    if matching == "index" or (matching == "auto" and missing and either_nameless):
        return list(range(len(class_names))), "index"
    if missing:
        raise ValueError(
            f"The model has no label for {len(missing)} of the data set's {len(class_names)} classes: "
            f"{_listed(missing)}. It knows {_listed(list(id2label.values()))}. If its labels have the order of the "
            "data set's classes, set match_labels to index."
        )
    for name in class_names:
        if len(labels_of_name[name]) > 1:
            listed = ", ".join(map(str, labels_of_name[name]))
            raise ValueError(
                f"{name!r} is a name of the model's labels {listed}. If the labels have the order of the data set's "
                "classes, set match_labels to index."
            )
    labels = [labels_of_name[name][0] for name in class_names]
    for label in labels:
        names = [name for name, other in zip(class_names, labels, strict=True) if other == label]
        if len(names) > 1:
            raise ValueError(
                f"The data set's classes {_listed(names)} are all the model's label {label} ({id2label[label]!r}): "
                "merge them, or set match_labels to index if the labels have the order of the classes."
            )
    return labels, "name"


def check_labels(images: LabeledImages, labels: Sequence[int], num_labels: int) -> None:
    """Refuse classes for which the model has no label.

    Raises:
        ValueError: Names the first of them, and its first image.
    """
    beyond = next((i for i, label in enumerate(labels) if label >= num_labels), None)
    if beyond is not None:
        rows = np.flatnonzero(images.labels == beyond)
        where = f", row {rows[0]}" if len(rows) else ""
        raise ValueError(
            f"{images.name}{where}: class {beyond} ({images.class_names[beyond]!r}) is beyond the model's labels "
            f"0..{num_labels - 1}."
        )


def _listed(names: Sequence[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
