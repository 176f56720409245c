"""Sample images of given classes from a saved pipeline: PNG files, a labeled grid and, on request, ADM's .npz.

    python sample/sample.py --model outputs/digits --classes 3 7 --num_images 64 --output_dir outputs/threes_and_sevens

Guidance and steps are those saved in the pipeline. Each sample has its own seed, so its picture does not
depend on the batch size or the number of images.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.raw_images import FolderImages, save_npz_images
from ..plots import image_grid
from ..utils.arguments import exit_on_error, parse_arguments, require_at_least
from ..utils.files import check_new, check_writable, write_atomically
from .generate import class_labels_for, describe_sampling, generate
from .settings import SamplingArguments, default_device, load_pipeline, parse_classes

GRID_IMAGES = 100


@dataclass(kw_only=True)
class SampleArguments:
    """Which images to sample, and where to write them."""

    output_dir: Path = field(metadata={"help": "New or empty folder for the images."})
    classes: list[str] = field(
        default_factory=list, metadata={"help": "Class ids or names, taken in turn; all by default."}
    )
    num_images: int = field(default=64, metadata={"help": "Images in all.", "aliases": ["--num_samples"]})
    samples_npz: Path | None = field(
        default=None, metadata={"help": "Also write the samples to this .npz, for ADM's evaluation."}
    )
    npz: bool = field(
        default=False, metadata={"help": "Older form of --samples_npz with samples.npz in --output_dir."}
    )
    device: str | None = field(default=None, metadata={"help": "Torch device; a GPU if there is one by default."})

    def __post_init__(self):
        require_at_least(self, 1, "num_images")
        if self.npz and self.samples_npz is None:
            self.samples_npz = self.output_dir / "samples.npz"


def sample(args: SampleArguments, sampling_args: SamplingArguments) -> str:
    """Sample what the arguments ask for into `output_dir`.

    Returns:
        The sampler in words.

    Raises:
        FileNotFoundError: If the model does not exist.
        OSError: If no file can be written.
        ValueError: If the arguments do not fit together or to the model, or the output folder is not empty.
    """
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise ValueError(f"output_dir {args.output_dir} is not an empty folder: choose another.")
    if args.samples_npz is not None:
        check_new(args.samples_npz, ".npz")
    pipe = load_pipeline(sampling_args, args.device or default_device())
    classes = parse_classes(pipe, args.classes) if args.classes else list(range(pipe.transformer.config.num_classes))
    settings = sampling_args.settings(pipe)
    labels = class_labels_for(args.num_images, classes)

    folder = args.output_dir / "images"
    check_writable(folder)
    if args.samples_npz is not None:
        check_writable(args.samples_npz.parent)
    shown = []
    for index, image in generate(pipe, labels, batch_size=sampling_args.batch_size, **settings):
        image.save(folder / f"{index:06d}-class{labels[index]}.png")
        if index < GRID_IMAGES:
            shown.append((classes.index(labels[index]), image))
    shown.sort(key=lambda pair: pair[0])
    texts = [pipe.id2label.get(classes[rank], str(classes[rank])) for rank, _ in shown]
    image_grid([image for _, image in shown], texts).save(args.output_dir / "grid.png")
    if args.samples_npz is not None:
        images = FolderImages(folder, "L" if pipe.transformer.config.in_channels == 1 else "RGB")
        write_atomically(args.samples_npz, lambda path: save_npz_images(path, images))
    sampler = describe_sampling(pipe, settings)
    record = {
        "kind": "samples",
        "model": sampling_args.model,
        "sampler": sampler,
        "dtype": sampling_args.dtype,
        **settings,
        "labels": labels,
    }
    (args.output_dir / "samples.json").write_text(json.dumps(record, indent=2))
    return sampler


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    args, sampling_args = parse_arguments((SampleArguments, SamplingArguments), argv, description=__doc__)
    with exit_on_error(ValueError, OSError):
        sampler = sample(args, sampling_args)
    print(f"Saved {args.num_images} images and their grid.png to {args.output_dir} ({sampler}).")


if __name__ == "__main__":
    main()
