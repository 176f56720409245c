"""Measure top-1 and top-5 accuracy of an image classifier, class by class, with its throughput and cost.

    python eval/accuracy.py --model outputs/sdt-h --dataset data/val --output outputs/sdt-h/accuracy.json

The model is any that transformers' AutoModelForImageClassification loads, including this project's. The images are a
folder with a subfolder for each class, a parquet file or a data set of the Hub, prepared by the model's own processor.
Classes and labels are matched by name where both have names, else by index. The script prints a table, and writes the
numbers, class by class, with the settings that made them to --output and a picture of the confusion beside it.
`accelerate launch eval/accuracy.py` shares the work among processes.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import transformers
from accelerate import PartialState

from ..data import LabeledImages, load_images
from ..data.decoding import check_class_folders
from ..data.images import ImageArguments
from ..metrics.confusion import Confusion, PreparedImages, classify
from ..metrics.extractors.base import refused_as
from ..metrics.extractors.transformers_models import channels_of, image_mode_for, load_classifier
from ..plots import plot_confusion
from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import (
    check_new,
    check_temporary_folder,
    check_writable,
    local_path,
    shorten_path,
    write_atomically,
    write_json,
)
from ..utils.fingerprint import fingerprint
from ..utils.ranges import CheckedArguments, between, check_number
from .cost import count_cost
from .labels import Matching, check_labels, match_labels


@dataclass
class AccuracyArguments(CheckedArguments):
    """The classifier, the images, and how to run it on them."""

    model: str = field(metadata={"help": "Folder or Hub name of an image classifier with its image processor."})
    dataset: str = field(
        metadata={
            "help": "Folder with a subfolder for each class, .parquet, .arrow or .tar file, Hub name, or 'digits'."
        }
    )
    output: Path = field(metadata={"help": "JSON file for the numbers; a picture of the confusion goes beside it."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split to read of a data set; by default, the data set must have only one."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found by its type."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels; found by its type."})
    match_labels: Matching = field(
        default="auto",
        metadata={"help": "How classes become the model's labels: by name where both have names, else by index."},
    )
    batch_size: int = field(default=64, metadata={"help": "Images at a time on each process."} | between(1, 100_000))
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that read and prepare images."} | between(0, 1024)
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "The model's arithmetic."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_temporary_folder(self.dataloader_num_workers)


def evaluate_accuracy(args: AccuracyArguments) -> str | None:
    """Classify a data set, and write `output` and a picture of the confusion beside it.

    All processes call this and share the batches. Wrong arguments are refused before any image is classified.

    Returns:
        The table, on the main process; `None` on the others.

    Raises:
        FileNotFoundError: If the model or the data set does not exist.
        OSError: If no file can be written beside `output`.
        ValueError: If model and data set do not fit, an image cannot be used, or an output exists.
    """
    state = PartialState()
    picture = args.output.with_suffix(".png")
    check_new(args.output, ".json")
    check_new(picture, ".png")
    model, processor = load_classifier(args.model, args.dtype, state.device)
    num_channels = channels_of(model)
    images = open_labeled_images(args, num_channels)
    labels, matched_by = match_labels(images.class_names, model.config.id2label, args.match_labels)
    check_labels(images, labels, model.config.num_labels)
    prepared = PreparedImages(images, processor, num_channels)
    sample = prepared.first().to(state.device, model.dtype)[None]
    with refused_as(f"{args.model} does not take what its image processor makes"):
        cost = count_cost(model, sample)
    check_writable(args.output.parent)
    confusion, speeds = classify(model, prepared, labels, args.batch_size, args.dataloader_num_workers)
    if not state.is_main_process:
        return None

    check_number("loss", confusion.loss)
    record = {
        "kind": "accuracy",
        **confusion.numbers(),
        "top1_standard_error": confusion.top1_standard_error,
        "class_mean": confusion.class_mean,
        "classes": describe_classes(confusion, images.class_names),
        "throughput": {
            "images_per_second": median(speeds),
            "batches": len(speeds),
            "batch_size": args.batch_size,
            "device": torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type,
            "threads": torch.get_num_threads(),
            "dtype": args.dtype,
        },
        "cost": {**cost.as_dict(), "input_shape": list(sample.shape[1:])},
        "model": {
            "path": shorten_path(args.model),
            "class": type(model).__name__,
            "weights": fingerprint(model),
            "num_labels": model.config.num_labels,
        },
        "data": {
            "dataset": shorten_path(args.dataset),
            "split": args.dataset_split,
            "count": len(images),
            "num_classes": images.num_classes,
            "classes_with_images": int((confusion.num_images > 0).sum()),
            "labels_matched_by": matched_by,
        },
        "processor": json.loads(processor.to_json_string()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    title = f"{Path(args.dataset).name}: top-1 {confusion.top1:.2%} of {len(images)} images"
    counts = confusion.within_data_set()
    # Write the numbers first, so that an error in the picture does not lose them.
    write_json(args.output, record)
    write_atomically(picture, lambda path: plot_confusion(counts, images.class_names, title, path))
    return f"{format_summary(record)}\n\n{format_classes(record['classes'])}"


def open_labeled_images(args: AccuracyArguments, num_channels: int) -> LabeledImages:
    """Open the data set; its images stay as they are, except for the model's number of channels.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If it cannot be read, has an empty class folder, or the model takes neither 1 nor 3 channels.
    """
    data_args = ImageArguments(
        dataset=args.dataset,
        dataset_split=args.dataset_split,
        image_column=args.image_column,
        label_column=args.label_column,
        image_mode=image_mode_for(num_channels),
    )
    images = load_images(data_args, default_resolution=None, as_pictures=True)
    check_class_folders(local_path(args.dataset), images.class_names)
    return images


#: Maximum number of classes in the printed table: those with the lowest accuracy. The record has all classes.
TABLE_CLASSES = 20


def describe_classes(confusion: Confusion, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Describe each class of the data set; accuracies are `None` where it has no images.

    `predicted` is a row of the confusion: label of the model -> images, without the labels that got none.
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
    """Format the numbers of the whole data set, and how they were made, in two columns."""
    speed, cost, data, model = (record[key] for key in ("throughput", "cost", "data", "model"))
    shape = "x".join(map(str, cost["input_shape"]))
    device = speed["device"] + (f", {speed['threads']} thread(s)" if speed["device"] == "cpu" else "")
    split = f" ({data['split']})" if data["split"] else ""
    rows = [
        ("top-1", f"{record['top1']:.2%} ± {record['top1_standard_error']:.2%}"),
        ("top-5", _percent(record["top5"], 2)),
        ("loss", f"{record['loss']:.4g}"),
        ("mean of classes", f"{record['class_mean']:.2%}"),
        ("images", f"{data['count']} of {data['dataset']}{split}, {data['classes_with_images']} classes"),
        ("labels", f"matched by {data['labels_matched_by']}"),
        ("throughput", f"{speed['images_per_second']:.4g} images/s, batch {speed['batch_size']}, {device}"),
        ("parameters", f"{cost['parameters']:,}"),
        ("multiply-adds", f"{cost['multiply_adds_2_30']:.4g} x 2^30 for {shape}"),
        ("GFLOPs", f"{cost['gflops']:.4g}"),
        ("model", f"{model['class']}, weights {model['weights']}, {speed['dtype']}"),
    ]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)


def format_classes(classes: Sequence[dict[str, Any]]) -> str:
    """Format a table of classes (at most `TABLE_CLASSES`) and of what each is most often mistaken for."""
    names = {described["label"]: described["name"] for described in classes}
    shown = classes
    note = ""
    if len(classes) > TABLE_CLASSES:
        present = [described for described in classes if described["count"]]
        shown = sorted(present, key=lambda described: described["top1"])[:TABLE_CLASSES]
        note = f"\nThe {len(shown)} of {len(classes)} classes with the lowest accuracy; the JSON file has all."
    rows = [("class", "images", "top-1", "top-5", "most often mistaken for")]
    for described in shown:
        wrong = {label: count for label, count in described["predicted"].items() if label != described["label"]}
        most = max(wrong, key=lambda label: wrong[label], default=None)
        taken = "" if most is None else f"{names.get(most, f'label {most}')} ({wrong[most]})"
        percents = [_percent(described[key]) for key in ("top1", "top5")]
        rows.append((described["name"], str(described["count"]), *percents, taken))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, *numbers, taken in rows:
        cells = [f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", *cells, taken]).rstrip())
    return "\n".join(lines) + note


def _percent(fraction: float | None, digits: int = 1) -> str:
    return "-" if fraction is None else f"{fraction:.{digits}%}"


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse_arguments((AccuracyArguments,), argv, description=__doc__)
    PartialState(cpu=not torch.cuda.is_available())
    table = evaluate_accuracy(args)
    if table is not None:
        print(f"\n{table}\n\nWritten to {args.output}.")


if __name__ == "__main__":
    main()
