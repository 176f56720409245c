"""Find the labels that class names and ids mean."""

from collections.abc import Sequence
from typing import Any

import torch


def labels_of_names(id2label: dict[int, str]) -> dict[str, list[int]]:
    """Map class names, and the words of names that are lists separated by commas, to their labels.

    The full name of a class means that class, even if it is also one of several words for another.
    """
    full, words = {}, {}
    for label, name in sorted(id2label.items()):
        full.setdefault(name, []).append(label)
        for word in {word.strip() for word in name.split(",")}:
            words.setdefault(word, []).append(label)
    return {**words, **full}


def label_ids(names: str | Sequence[str], labels_of_name: dict[str, list[int]], known: Sequence[str]) -> list[int]:
    """Return the labels of class names.

    Args:
        names: A name, or several.
        labels_of_name: `labels_of_names` of the classes.
        known: The classes' names, for a message.

    Raises:
        ValueError: If a name is unknown, or means several classes.
    """
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in labels_of_name]
    if unknown:
        known = list(dict.fromkeys(known))
        listed = ", ".join(map(repr, known[:20])) or "none: the pipeline has no id2label"
        more = f" and {len(known) - 20} more" if len(known) > 20 else ""
        raise ValueError(f"Unknown class name(s) {', '.join(map(repr, unknown))}. Known names: {listed}{more}.")
    for name in names:
        if len(labels_of_name[name]) > 1:
            ids = ", ".join(map(str, labels_of_name[name]))
            raise ValueError(f"{name!r} is a name of the classes {ids}: give the id.")
    return [labels_of_name[name][0] for name in names]


def flat_labels(class_labels: Any) -> list[Any]:
    """Return a label, or a sequence or tensor of labels that is nested at most once, as a flat list."""
    if isinstance(class_labels, torch.Tensor) or hasattr(class_labels, "tolist"):
        class_labels = class_labels.tolist()
    if isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
        class_labels = [class_labels]
    return [label for each in class_labels for label in (each if isinstance(each, (list, tuple)) else [each])]
