"""Top-1 and top-5 accuracy of an image classifier, class by class, with its throughput and cost.

    python eval/accuracy.py --model outputs/sdt-h --dataset data/val --output outputs/sdt-h/accuracy.json

Any model of transformers' AutoModelForImageClassification, this project's among them, on a folder (a subfolder a
class), a parquet file or a data set of the Hub, prepared by the model's own image processor. Classes and labels are
matched by name where both have names, else by index. Prints a table, and writes the numbers, class by class, with all
that made them to --output and a picture of the confusion beside it. `accelerate launch eval/accuracy.py` shares the
work among processes.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data import CorruptImageError, LabeledImages, load_images
from ..data.images import ImageArguments, check_class_folders
from ..metrics.confusion import Confusion, RunningConfusion
from ..metrics.extractors.transformers_models import channels_of, image_mode_for, load_classifier, prepare_picture
from ..plots import plot_confusion
from ..utils.arguments import errors_in_a_line, parse_arguments, require_at_least
from ..utils.files import check_new, check_writable, write_atomically
from ..utils.fingerprint import fingerprint
from .cost import count_cost
from .labels import Matching, check_labels, match_labels


@dataclass
class AccuracyArguments:
    """What to classify with what."""

    model: str = field(metadata={"help": "Folder or Hub name of an image classifier with its image processor."})
    dataset: str = field(
        metadata={"help": "Image folder (a subfolder a class), .parquet, .arrow or .tar file, Hub name, or 'digits'."}
    )
    output: Path = field(metadata={"help": "JSON file for the numbers; a picture of the confusion goes beside it."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split to read of a data set; the only one there is by default."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found by its type."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels; found by its type."})
    match_labels: Matching = field(
        default="auto",
        metadata={"help": "How classes become the model's labels: by name where both have names, else by index."},
    )
    batch_size: int = field(default=64, metadata={"help": "Images at a time on each process."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read and prepare images."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "The model's arithmetic."}
    )

    def __post_init__(self):
        require_at_least(self, 0, "dataloader_num_workers")
        require_at_least(self, 1, "batch_size")


def evaluate_accuracy(args: AccuracyArguments) -> str | None:
    """Classifies a data set and writes `--output` and the confusion's picture beside it.

    Called by all processes, which share the batches. What can be refused is refused before any image is classified.

    Returns:
        The table, on the main process.

    Raises:
        FileNotFoundError: If model or data set are not there.
        OSError: If no file can be written beside `--output`.
        ValueError: If they do not fit together, an image cannot be used, or an output exists.
    """
    state = PartialState()
    picture = args.output.with_suffix(".png")
    check_new(args.output, ".json")
    check_new(picture, ".png")
    model, processor = load_classifier(args.model, args.dtype, state.device)
    num_channels = channels_of(model)
    images = open_labelled_images(args, num_channels)
    labels, matched_by = match_labels(images.class_names, model.config.id2label, args.match_labels)
    check_labels(images, labels, model.config.num_labels)
    prepared = PreparedImages(images, processor, num_channels)
    sample = prepared.first().to(state.device, model.dtype)[None]
    cost = count_cost(model, sample)
    check_writable(args.output.parent)
    confusion, speeds = classify(model, prepared, labels, args.batch_size, args.dataloader_num_workers)
    if not state.is_main_process:
        return None

    record = {
        "top1": confusion.top1,
        "top1_standard_error": confusion.top1_standard_error,
        "top5": confusion.top5,
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
            "path": args.model,
            "class": type(model).__name__,
            "weights": fingerprint(model),
            "num_labels": model.config.num_labels,
        },
        "data": {
            "dataset": args.dataset,
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
    write_atomically(picture, lambda path: plot_confusion(counts, images.class_names, title, path))
    write_atomically(args.output, lambda path: path.write_text(json.dumps(record, indent=1)))
    return f"{format_summary(record)}\n\n{format_classes(record['classes'])}"


def open_labelled_images(args: AccuracyArguments, num_channels: int) -> LabeledImages:
    """The data set, with its images as they are but for the model's number of channels.

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
    check_class_folders(Path(args.dataset).expanduser(), images.class_names)
    return images


class PreparedImages(Dataset):
    """Images as the model's own image processor makes them, with their classes.

    Errors are items: a worker of a data loader would wrap them in its own traceback.
    """

    def __init__(self, images: LabeledImages, processor: Any, num_channels: int):
        self.images, self.processor, self.num_channels = images, processor, num_channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int] | CorruptImageError]:
        try:
            pictures = self.images.__getitems__(indices)
            return [
                (prepare_picture(picture, self.processor, self.num_channels), label) for picture, label in pictures
            ]
        except CorruptImageError as error:
            return [error]

    def first(self) -> torch.Tensor:
        """The first image, which tells the shape of all; errors as of `prepare_picture` and the images'."""
        (item,) = self.__getitems__([0])
        if isinstance(item, CorruptImageError):
            raise item
        return item[0]


@torch.inference_mode()
def classify(
    model: nn.Module, images: PreparedImages, labels: list[int], batch_size: int, num_workers: int = 0
) -> tuple[Confusion, list[float]]:
    """Classifies all images, on all processes, in memory that does not grow with their number.

    Args:
        model: The model.
        images: The images.
        labels: The model's label for each class of the data set.
        batch_size: Images at a time.
        num_workers: Processes that read and prepare images.

    Returns:
        The confusion, and this process's images per second in the forward pass of each batch but the first, which
        warms up, unless there is no other.

    Raises:
        CorruptImageError: If an image cannot be decoded; the message names it.
        ValueError: If images come in several sizes, or logits are not finite.
    """
    state = PartialState()
    running = RunningConfusion(labels, model.config.num_labels, state.device)
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    mine = [list(batch) for batch in batches[state.process_index :: state.num_processes]]
    loader = DataLoader(images, batch_sampler=mine, num_workers=num_workers, collate_fn=list)
    speeds = []
    with tqdm(total=sum(map(len, mine)), desc="Images", unit="image", disable=not state.is_main_process) as bar:
        for rows, items in zip(mine, loader, strict=True):
            pixel_values, classes = _stack(items, images.images.name)
            pixel_values = pixel_values.to(state.device, model.dtype)
            start = _now(state.device)
            logits = model(pixel_values).logits
            if len(rows) == len(batches[0]):  # the last one may be smaller, and slower an image
                speeds.append(len(rows) / (_now(state.device) - start))
            bad = (~logits.isfinite()).any(dim=1).nonzero()
            if len(bad):
                raise ValueError(f"The logits of {images.images.name}, row {rows[int(bad[0])]}, are not finite.")
            running.update(logits, classes.to(state.device))
            bar.update(len(rows))
    return running.result(), speeds[1:] or speeds


def _stack(items, name):
    for item in items:
        if isinstance(item, CorruptImageError):
            raise item
    shapes = sorted({tuple(pixels.shape) for pixels, _ in items})
    if len(shapes) > 1:
        raise ValueError(
            f"The image processor makes tensors of several shapes of {name}, {shapes[0]} and {shapes[-1]} among them: "
            "give --batch_size 1, or let it crop."
        )
    pixels, classes = zip(*items, strict=True)
    return torch.stack(pixels), torch.tensor(classes)


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse_arguments((AccuracyArguments,), argv, description=__doc__)
    PartialState(cpu=not torch.cuda.is_available())
    with errors_in_a_line(ValueError, OSError):
        table = evaluate_accuracy(args)
    if table is not None:
        print(f"\n{table}\n\nWritten to {args.output}.")
