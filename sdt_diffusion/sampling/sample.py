"""Sample images of given classes from a saved pipeline: PNG files, a labeled grid and, on request, ADM's .npz.

    python sample/sample.py --model outputs/digits --classes 3 7 --num_images 64 --output_dir outputs/threes_and_sevens

Guidance and steps are those saved in the pipeline. Each sample has its own seed, so its picture does not
depend on the batch size or the number of images. If the command is killed, the same command goes on where it was;
under `accelerate launch`, the processes share the images.
"""

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from PIL import Image

from ..data.raw_images import save_npz_images
from ..plots import image_grid
from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import (
    FolderLock,
    check_new,
    check_writable,
    move_into,
    require_space,
    valid_json,
    write_atomically,
    write_json,
)
from ..utils.fingerprint import differences
from ..utils.ranges import CheckedArguments, between
from ..utils.reading import read_json, walk_files
from .folder import (
    MANIFEST_FILE,
    MAX_SAMPLES,
    bytes_per_sample,
    guider_record,
    sample_into,
    scaling_record,
    weights_of,
)
from .generate import class_labels_for, describe_sampling
from .settings import SamplingArguments, default_device, load_pipeline, parse_classes

GRID_IMAGES = 100
RECORD_FILE = "samples.json"
#: Where the pixels are until the pictures are written.
BATCHES_FOLDER = "batches"


@dataclass(kw_only=True)
class SampleArguments(CheckedArguments):
    """Which images to sample, and where to write them."""

    output_dir: Path = field(metadata={"help": "Folder for the images: new, empty, or begun by the same command."})
    classes: list[str] = field(
        default_factory=list, metadata={"help": "Class ids or names, taken in turn; all by default."}
    )
    num_images: int = field(
        default=64, metadata={"help": "Images in all.", "aliases": ["--num_samples"]} | between(1, MAX_SAMPLES)
    )
    samples_npz: Path | None = field(
        default=None, metadata={"help": "Also write the samples to this .npz, for ADM's evaluation."}
    )
    npz: bool = field(
        default=False, metadata={"help": "Older form of --samples_npz with samples.npz in --output_dir."}
    )
    device: str | None = field(default=None, metadata={"help": "Torch device; a GPU if there is one by default."})

    def __post_init__(self):
        super().__post_init__()
        if self.npz and self.samples_npz is None:
            self.samples_npz = self.output_dir / "samples.npz"


def sample(args: SampleArguments, sampling_args: SamplingArguments) -> str:
    """Sample what the arguments ask for into `output_dir`, starting from what a killed run of the same left there.

    Called by all processes, which share the batches. The pixels are kept in batches until the pictures are written.

    Returns:
        The sampler in words.

    Raises:
        FileNotFoundError: If the model does not exist.
        OSError: If no file can be written, or the disk cannot hold the samples.
        ValueError: If the arguments do not fit together or to the model, a sample is not finite, or the output folder
            holds something else.
    """
    folder, state = args.output_dir, PartialState()
    batches = folder / BATCHES_FOLDER
    begun = (folder / RECORD_FILE).is_file() or (batches / MANIFEST_FILE).is_file()
    if folder.exists() and not begun and (not folder.is_dir() or any(walk_files(folder))):
        raise ValueError(f"output_dir {folder} is not an empty folder: choose another.")
    if args.samples_npz is not None and not (folder / RECORD_FILE).is_file():
        check_new(args.samples_npz, ".npz")
    for path in (folder, *([args.samples_npz.parent] if args.samples_npz else [])):
        check_writable(next(parent for parent in (path, *path.absolute().parents) if parent.exists()))
    pipe = load_pipeline(sampling_args, args.device or (state.device if state.num_processes > 1 else default_device()))
    classes = parse_classes(pipe, args.classes) if args.classes else list(range(pipe.transformer.config.num_classes))
    settings = sampling_args.settings(pipe)
    labels = class_labels_for(args.num_images, classes)
    sampler = describe_sampling(pipe, settings)
    record = {
        "kind": "samples",
        "model": sampling_args.model,
        "sampler": sampler,
        "dtype": sampling_args.dtype,
        **settings,
        **guider_record(pipe),
        **scaling_record(pipe, settings),
        "labels": labels,
    }
    with FolderLock(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            _check_record(folder, record, pipe)
        state.wait_for_everyone()
        if _is_complete(args, labels):
            return sampler
        if args.samples_npz is not None:
            check_writable(args.samples_npz.parent)
        num_bytes = bytes_per_sample(pipe, settings) * args.num_images
        require_space(folder, (2 if args.samples_npz is None else 5) * num_bytes, "The samples")
        attention = sampling_args.attention_record()
        samples = sample_into(batches, pipe, labels, settings, sampling_args.batch_size, attention=attention)
        if state.is_main_process:
            names = [pipe.id2label.get(label, str(label)) for label in labels]
            move_into(folder, lambda partial: _save_pictures(partial, samples, labels, classes, names))
            if args.samples_npz is not None:
                write_atomically(args.samples_npz, lambda path: save_npz_images(path, samples))
            write_json(folder / RECORD_FILE, {**record, "weights": samples.manifest["weights"]})
            shutil.rmtree(batches)
        state.wait_for_everyone()
    return sampler


def _check_record(folder, record, pipe):
    """Refuse a folder that another command, or another model, has filled."""
    if (folder / RECORD_FILE).is_file():
        now = {**valid_json(record), "weights": weights_of(pipe)}
        found = differences(read_json(folder / RECORD_FILE), now, unquoted=("labels",))
        if found:
            raise ValueError(
                f"output_dir {folder} is not an empty folder: it holds other samples ({'; '.join(found)}). Choose "
                "another."
            )


def _is_complete(args, labels):
    files = [args.output_dir / "images" / _picture_name(index, label) for index, label in enumerate(labels)]
    files += [args.output_dir / name for name in ("grid.png", RECORD_FILE)]
    return all(path.is_file() for path in (*files, *([args.samples_npz] if args.samples_npz else [])))


def _picture_name(index, label):
    return f"{index:06d}-class{label}.png"


def _save_pictures(folder, samples, labels, classes, names):
    (folder / "images").mkdir()
    shown = []
    for index, label in enumerate(labels):
        picture = Image.fromarray(samples[index].squeeze(2) if samples[index].shape[2] == 1 else samples[index])
        picture.save(folder / "images" / _picture_name(index, label))
        if index < GRID_IMAGES:
            shown.append((classes.index(label), picture, names[index]))
    shown.sort(key=lambda entry: entry[0])
    image_grid([picture for _, picture, _ in shown], [name for *_, name in shown]).save(folder / "grid.png")


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    args, sampling_args = parse_arguments((SampleArguments, SamplingArguments), argv, description=__doc__)
    sampler = sample(args, sampling_args)
    if PartialState().is_main_process:
        print(f"Saved {args.num_images} images and their grid.png to {args.output_dir} ({sampler}).")


if __name__ == "__main__":
    main()
