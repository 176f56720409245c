"""Samples images of given classes from a saved pipeline: PNG files, a labelled grid, and ADM's .npz if wanted.

    python sample/sample.py --model outputs/digits --classes 3 7 --num_images 64 --output_dir outputs/threes_and_sevens

Sample i has its own seed, so that it is the same picture whatever the batch size and the number of images.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import sdt_diffusion  # noqa: F401  (lets diffusers find the pipeline's classes)

from ..data.raw_images import FolderImages, save_npz_images
from ..plots import image_grid
from ..sdt.schedulers import swap_scheduler
from ..utils.files import write_atomically
from .generate import class_labels_for, describe_sampling, generate

GRID_IMAGES = 100


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="Folder or Hub name of a saved pipeline.")
    parser.add_argument("--classes", nargs="+", help="Class ids or names, taken in turn; all by default.")
    parser.add_argument("--num_images", type=int, default=64, help="Images in all.")
    parser.add_argument("--output_dir", type=Path, required=True, help="New or empty folder for the images.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--scheduler", help="Class name of another diffusers scheduler than the saved one.")
    parser.add_argument("--npz", action="store_true", help="Also write samples.npz in the layout of ADM's evaluation.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args(argv)
    if min(args.num_images, args.batch_size, args.num_inference_steps) < 1 or args.seed < 0:
        parser.error("--num_images, --batch_size and --num_inference_steps must be at least 1, --seed at least 0.")
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"--output_dir {args.output_dir} is not an empty folder: choose another.")
    return parser, args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    parser, args = parse(argv)
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    num_classes = pipe.transformer.config.num_classes
    given = args.classes or range(num_classes)
    try:
        if args.scheduler:
            pipe.scheduler = swap_scheduler(pipe.scheduler, args.scheduler)
        # A word that names a class is that class, else a number is an id: the digits' names are numbers themselves.
        classes = pipe.prepare_class_labels(
            [int(c) if isinstance(c, str) and c not in pipe.labels and c.lstrip("-").isdigit() else c for c in given]
        )
    except ValueError as error:
        parser.error(str(error))

    sampling = {
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps,
    }
    labels = class_labels_for(args.num_images, classes)
    folder = args.output_dir / "images"
    folder.mkdir(parents=True)
    shown = []
    mode = "L" if pipe.transformer.config.in_channels == 1 else "RGB"
    for index, image in generate(pipe, labels, batch_size=args.batch_size, **sampling):
        image.save(folder / f"{index:06d}-class{labels[index]}.png")
        if index < GRID_IMAGES:
            shown.append((classes.index(labels[index]), image))
    shown.sort(key=lambda pair: pair[0])
    texts = [pipe.id2label.get(classes[rank], str(classes[rank])) for rank, _ in shown]
    columns = min(10, -int(-(len(shown) ** 0.5) // 1))
    image_grid([image for _, image in shown], texts, columns).save(args.output_dir / "grid.png")
    if args.npz:
        images = FolderImages(folder, mode)
        write_atomically(args.output_dir / "samples.npz", lambda path: save_npz_images(path, images))
    description = describe_sampling(pipe, sampling)
    record = {"model": args.model, "sampler": description, "dtype": args.dtype, **sampling, "labels": labels}
    (args.output_dir / "samples.json").write_text(json.dumps(record, indent=2))
    print(f"Saved {args.num_images} images and their grid.png to {args.output_dir} ({description}).")
