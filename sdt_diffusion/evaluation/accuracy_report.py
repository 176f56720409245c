"""The accuracy of a classifier in words: for records, and in tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metrics.classification import Confusion

#: Classes in the printed table; of more, those with the lowest accuracy. The record has them all.
TABLE_CLASSES = 20


def describe_classes(confusion: Confusion, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """What is known of each class of the data set; accuracies are `None` where it has no images.

    `predicted` is a row of the confusion: label of the model -> images, where there are any.
    """
    described = []
    for i, (name, label, count) in enumerate(zip(class_names, confusion.labels, confusion.num_images, strict=True)):
        row = confusion.counts[i]
        described.append(
            {
                "name": name,
                "label": int(label),
                "count": int(count),
                "top1": float(confusion.correct[i] / count) if count else None,
                "top5": float(confusion.found[i] / count) if count and confusion.found is not None else None,
                "predicted": {int(predicted): int(row[predicted]) for predicted in np.flatnonzero(row)},
            }
        )
    return described


def format_summary(record: dict[str, Any]) -> str:
    """The numbers of the whole data set, and how they were made, in two columns."""
    speed, cost, data, model = (record[key] for key in ("throughput", "cost", "data", "model"))
    shape = "x".join(map(str, cost["input_shape"]))
    where = speed["device"] + (f", {speed['threads']} thread(s)" if speed["device"] == "cpu" else "")
    split = f" ({data['split']})" if data["split"] else ""
    rows = [
        ("top-1", f"{record['top1']:.2%} ± {record['top1_standard_error']:.2%}"),
        ("top-5", _percent(record["top5"], 2)),
        ("mean of classes", f"{record['class_mean']:.2%}"),
        ("images", f"{data['count']} of {data['dataset']}{split}, {data['classes_with_images']} classes"),
        ("labels", f"matched by {data['labels_matched_by']}"),
        ("throughput", f"{speed['images_per_second']:.4g} images/s, batch {speed['batch_size']}, {where}"),
        ("parameters", f"{cost['parameters']:,}"),
        ("multiply-adds", f"{cost['multiply_adds_2_30']:.4g} x 2^30 for {shape}"),
        ("GFLOPs", f"{cost['gflops']:.4g}"),
        ("model", f"{model['class']}, weights {model['weights']}, {speed['dtype']}"),
    ]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def format_classes(classes: Sequence[dict[str, Any]]) -> str:
    """A table of classes, of many those with the lowest accuracy, and what each is mostly taken for instead."""
    names = {described["label"]: described["name"] for described in classes}
    shown = classes
    note = ""
    if len(classes) > TABLE_CLASSES:
        present = [described for described in classes if described["count"]]
        shown = sorted(present, key=lambda described: described["top1"])[:TABLE_CLASSES]
        note = f"\nThe {len(shown)} of {len(classes)} classes with the lowest accuracy; the JSON file has all."
    rows = [("class", "images", "top-1", "top-5", "mostly taken for")]
    for described in shown:
        wrong = {label: count for label, count in described["predicted"].items() if label != described["label"]}
        most = max(wrong, key=wrong.get, default=None)
        taken = "" if most is None else f"{names.get(most, f'label {most}')} ({wrong[most]})"
        percents = [_percent(described[key]) for key in ("top1", "top5")]
        rows.append((described["name"], str(described["count"]), *percents, taken))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, *numbers, taken in rows:
        cells = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *cells, taken]).rstrip())
    return "\n".join(lines) + note


def _percent(fraction, digits=1):
    return "-" if fraction is None else f"{fraction:.{digits}%}"
