"""What a network's learned decay lets it look at: a picture for chosen patches, head by head.

    python eval/decay_maps.py --model outputs/sdt-h --image cat.jpg --output outputs/sdt-h/decay.png
    python eval/decay_maps.py --model outputs/digits --timestep 900 500 100 --class_label 3 --output decay.png

A classifier is shown an image, a generator a sample of its own, noised to each timestep. A row is a patch, marked, and
a map a head. The colour is exp(M), the factor by which the decay multiplies attention to each patch before it is
normalised; beneath stands at how many patches' distance it has fallen to a half. Where attention is decomposed into
rows and columns, it is the product of both passes. --attention adds the attention that comes of it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

import sdt_diffusion  # noqa: F401  (lets diffusers find the pipeline's classes)

from ..data.decoding import check_bit_depth
from ..metrics.extractors.transformers_models import (
    channels_of,
    image_mode_for,
    load_classifier,
    prepare_picture,
    undo_normalization,
)
from ..plots import DecayRow, DecaySection, plot_decays
from ..sampling.generate import generate
from ..sdt.schedulers import noise_scales
from ..sdt.vae import decode_latents
from ..utils.arguments import errors_in_a_line, parse_arguments, require_at_least
from ..utils.files import check_new, check_writable, write_atomically
from ..utils.fingerprint import fingerprint
from ..utils.seeding import Stream, torch_generator
from .decay import BlockDecay, attention_maps, decay_maps, half_distances, record_decays


@dataclass
class DecayArguments:
    """Whose decays to draw, for what."""

    model: str = field(metadata={"help": "Folder or Hub name of a classifier (with --image) or of a pipeline."})
    output: Path = field(metadata={"help": "PNG file for the picture."})
    image: Path | None = field(default=None, metadata={"help": "Image to show to a classifier."})
    timestep: list[float] = field(
        default_factory=list, metadata={"help": "Timesteps to which to noise a generator's sample."}
    )
    class_label: str | None = field(default=None, metadata={"help": "Id or name of the class to sample."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample and its noise."})
    guidance_scale: float = field(default=1.5, metadata={"help": "Classifier-free guidance of the sample."})
    num_inference_steps: int = field(default=50, metadata={"help": "Sampling steps of the sample."})
    blocks: list[int] = field(
        default_factory=list, metadata={"help": "Blocks, from 0; the first, middle and last by default."}
    )
    patches: list[str] = field(
        default_factory=list,
        metadata={"help": "Patches to look from, such as 3,4 for row 3, column 4 of the first block's grid."},
    )
    attention: bool = field(default=False, metadata={"help": "Also draw the attention that comes of it."})

    def __post_init__(self):
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "num_inference_steps")


#: A title, the network, and for each input a label, what the network sees of it, and the decays of its blocks.
Look = tuple[str, nn.Module, list[tuple[str, Image.Image, list[BlockDecay]]]]
CAPTION = "One map a head, seen from the marked patch. ½ at n: beyond n patches the decay more than halves attention."


@torch.no_grad()
def draw_decays(args: DecayArguments, device: torch.device | str = "cpu") -> None:
    """Draws what the arguments ask for to `--output`.

    Raises:
        FileNotFoundError: If a model or an image is not there.
        OSError: If no file can be written beside `--output`.
        ValueError: If the arguments do not fit together or to the model, or the output exists.
    """
    check_new(args.output, ".png")
    if (args.image is None) == (not args.timestep):
        raise ValueError(
            "Give either --image, to show to a classifier, or --timestep, to noise a generator's sample to."
        )
    check_writable(args.output.parent)
    look = look_at_image if args.image is not None else look_at_samples
    title, model, shown = look(args, device)
    patches = parse_patches(args.patches, shown[0][2][0].grid_size, default=2 if len(shown) == 1 else 1)
    sections = [
        DecaySection(
            decays[0].describe(),
            [
                row
                for (label, picture, _), decay in zip(shown, decays, strict=True)
                for row in _rows(label, picture, decay, patches, shown[0][2][0].grid_size, args.attention)
            ],
        )
        for decays in zip(*(decays for _, _, decays in shown), strict=True)
    ]
    caption = f"{type(model).__name__}, weights {fingerprint(model)}\n{CAPTION}"
    write_atomically(args.output, lambda path: plot_decays(sections, title, caption, path))


def look_at_image(args: DecayArguments, device) -> Look:
    """The decays of a classifier for an image, with that image as the classifier sees it."""
    model, processor = load_classifier(args.model, "float32", device)
    num_channels = channels_of(model)
    image_mode = image_mode_for(num_channels)
    try:
        with Image.open(args.image) as opened:
            check_bit_depth(opened)
            picture = opened.convert(image_mode)
    except OSError as error:
        raise FileNotFoundError(f"--image {args.image} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"--image {args.image}: {error}") from error
    pixel_values = prepare_picture(picture, processor, num_channels)
    with record_decays(model, args.blocks, args.attention) as decays:
        probabilities = model(pixel_values[None].to(device)).logits[0].softmax(dim=0)
    best = int(probabilities.argmax())
    title = f"{args.image.name}, taken for {model.config.id2label[best]!r} ({float(probabilities[best]):.0%})"
    return title, model, [("", undo_normalization(pixel_values, processor), decays)]


def look_at_samples(args: DecayArguments, device) -> Look:
    """The decays of a generator for a sample of its own, noised to each timestep, with what it sees there."""
    pipe = DiffusionPipeline.from_pretrained(args.model).to(device)
    pipe.transformer.eval()
    if args.class_label is None:
        raise ValueError("Give --class_label, for which the generator is to sample.")
    label = args.class_label  # a word that names a class is that class, else a number is an id
    (label,) = pipe.prepare_class_labels(int(label) if label not in pipe.labels and label.isdecimal() else label)
    scales = [noise_scales(pipe.scheduler, timestep, "--timestep") for timestep in args.timestep]
    sampling = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    ((_, clean),) = generate(pipe, [label], seed=args.seed, output_type="latent", progress=False, **sampling)
    noise = torch.randn(clean.shape, generator=torch_generator(Stream.NOISED_SAMPLE, args.seed, 0)).to(clean)
    shown = []
    for timestep, (signal_scale, noise_scale) in zip(args.timestep, scales, strict=True):
        noised = (signal_scale * clean + noise_scale * noise)[None]
        with record_decays(pipe.transformer, args.blocks, args.attention) as decays:
            pipe.transformer(noised, torch.tensor([timestep], device=device), torch.tensor([label], device=device))
        pixels = noised if pipe.vae is None else decode_latents(pipe.vae, noised)
        (picture,) = pipe.image_processor.postprocess(pixels)
        shown.append((f"t = {timestep:g}", picture, decays))
    name = pipe.id2label.get(label, str(label))
    return f"a sample of the class {name!r}, seed {args.seed}", pipe.transformer, shown


def parse_patches(texts: Sequence[str], grid_size: tuple[int, int], default: int) -> list[tuple[int, int]]:
    """Patches from texts such as "3,4" (row and column); without any, the centre, and one nearer to a corner.

    Raises:
        ValueError: If a text is not two numbers on the grid.
    """
    rows, columns = grid_size
    if not texts:
        return [(rows // 2, columns // 2), (rows // 4, columns // 4)][:default]
    patches = []
    for text in texts:
        parts = text.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"--patches {text!r}: give row and column, such as 3,4.")
        y, x = map(int, parts)
        if y >= rows or x >= columns:
            raise ValueError(f"--patches {text!r}: the grid of the first block is {rows} x {columns}, counted from 0.")
        patches.append((y, x))
    return patches


def _rows(label, picture, decay, patches, named_on, attention):
    """Rows of the picture for one image: the patches, on this block's grid where they lie on the grid named on."""
    patches = [
        tuple(int((i + 0.5) / old * new) for i, old, new in zip(patch, named_on, decay.grid_size, strict=True))
        for patch in patches
    ]
    factors, halves = decay_maps(decay, patches).cpu().numpy(), half_distances(decay, patches)
    for i, patch in enumerate(patches):
        heads = [f"head {head}" for head in range(len(factors[i]))]
        where = f"{label}\npatch {patch[0]},{patch[1]}".strip()
        notes = heads
        if halves is not None:
            notes = [f"{head}, ½ at {_brief(float(half))}" for head, half in zip(heads, halves[i], strict=True)]
        yield DecayRow("decay", where, picture, patch, factors[i], notes)
        if attention:
            shares = attention_maps(decay, patches[i : i + 1])[0].cpu().numpy()
            highest = shares.max(axis=(1, 2))
            notes = [f"{head}, max {share:.2g}" for head, share in zip(heads, highest, strict=True)]
            yield DecayRow("attention", "attention", None, patch, shares / highest[:, None, None], notes)


def _brief(value):
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse_arguments((DecayArguments,), argv, description=__doc__)
    with errors_in_a_line(ValueError, OSError):
        draw_decays(args, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"Written to {args.output}.")
