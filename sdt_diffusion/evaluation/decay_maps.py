"""Draw how far a network's learned decay lets it look: for chosen patches, head by head.

    python eval/decay_maps.py --model outputs/sdt-h --image cat.jpg --output outputs/sdt-h/decay.png
    python eval/decay_maps.py --model outputs/digits --timestep 900 500 100 --class_label 3 --output decay.png

A classifier gets an image; a generator gets a sample of its own, noised to each timestep. Each row belongs to a
patch, which is marked, and each map to a head. The color is exp(M), the factor by which the decay multiplies attention
to each patch before it is normalized; the text below a map is the distance, in patches, at which the factor has fallen
to a half. Where attention is decomposed into rows and columns, the factor is the product of both passes. --attention
adds maps of the attention itself.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..blocks import SDTAttention
from ..data.decoding import check_bit_depth
from ..metrics.extractors.base import refused_as
from ..metrics.extractors.transformers_models import (
    channels_of,
    image_mode_for,
    load_classifier,
    prepare_picture,
    undo_normalization,
)
from ..plots import printable
from ..sampling.generate import generate
from ..sampling.settings import PipelineArguments, default_device, load_pipeline, parse_classes
from ..sdt.schedulers import noise_scales
from ..sdt.vae import decode_latents
from ..utils.arguments import exit_on_error, one_line, parse_arguments
from ..utils.files import check_new, check_writable, write_atomically
from ..utils.fingerprint import fingerprint
from ..utils.ranges import between
from ..utils.seeding import Stream, torch_generator
from .decay import BlockDecay, attention_maps, decay_maps, half_distances, record_decays

#: Kind of row -> colormap, and what its colors mean.
KINDS = {
    "decay": ("magma", "exp(M): factor of the decay on attention"),
    "attention": ("viridis", "attention, relative to the map's highest"),
}
MARK = "#00e5ff"
#: Maps in a line; more go to the next.
COLUMNS = 8
#: Sizes in inches: a map; the space between maps, at the left for labels, below a map, above a section, above all and
#: below all.
CELL, GAP, LEFT, NOTE, SECTION, TOP, BOTTOM = 1.1, 0.08, 0.85, 0.2, 0.3, 0.72, 0.75
#: Rows of a picture that can be drawn.
MAX_ROWS = 200
#: Characters of a title that fit into the narrowest picture.
MAX_TITLE = 75
#: Smallest side of the mark around a patch, as a part of the picture.
MIN_MARK = 1 / 14


@dataclass
class DecayRow:
    """One patch, and a map for each head.

    Args:
        kind: A key of `KINDS`.
        label: Text at the left.
        picture: What the network sees; `None` for the same as in the row above.
        patch: Row and column of the patch.
        maps: Values from 0 to 1, shape (heads, rows, columns).
        notes: Text below each map.
    """

    kind: str
    label: str
    picture: Image.Image | None
    patch: tuple[int, int]
    maps: np.ndarray
    notes: Sequence[str]

    @property
    def num_lines(self) -> int:
        """Number of lines of at most `COLUMNS` maps."""
        return -(-len(self.maps) // COLUMNS)

    @property
    def height(self) -> float:
        """Height of a line of maps in inches; a map is `CELL` wide."""
        return CELL * self.maps.shape[1] / self.maps.shape[2]


@dataclass
class DecaySection:
    """Rows of one block."""

    title: str
    rows: Sequence[DecayRow]


def plot_decays(sections: Sequence[DecaySection], title: str, caption: str, path: Path | IO[bytes]) -> None:
    """Draw a section for each block, in it a row for each patch, and in that a map for each head.

    All maps of a kind share one color scale, 0 to 1.

    Args:
        sections: The blocks.
        title: Title of the picture; one that is too long is cut.
        caption: Two lines below the title.
        path: PNG file to write, or an open file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    rows = [row for section in sections for row in section.rows]
    columns = min(max(len(row.maps) for row in rows), COLUMNS)
    width = max(_left_of(columns), 6.8)
    lines = sum(row.num_lines * (row.height + NOTE + GAP) for row in rows)
    height = TOP + len(sections) * SECTION + lines + BOTTOM
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    def axes_at(left, top, wide, high):
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    def write(left, top, text, size, **style):
        style = {"va": "top", "parse_math": False, **style}  # names may hold dollar signs
        figure.text(left / width, 1 - top / height, printable(text), fontsize=size, **style)

    write(GAP, GAP, title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 1]}…", 10, fontweight="bold")
    write(GAP, GAP + 0.22, caption, 8)
    top = TOP
    for section in sections:
        write(GAP, top, section.title, 10)
        top += SECTION
        for row in section.rows:
            write(LEFT - GAP, top + row.height / 2, row.label, 8, ha="right", va="center")
            if row.picture is not None:
                _show(axes_at(LEFT, top, CELL, row.height), row.picture.convert("RGB"), row)
            for head, (values, note) in enumerate(zip(row.maps, row.notes, strict=True)):
                left = _left_of(head % COLUMNS)
                y = top + head // COLUMNS * (row.height + NOTE + GAP)
                _show(axes_at(left, y, CELL, row.height), values, row, cmap=KINDS[row.kind][0], vmin=0, vmax=1)
                write(left + CELL / 2, y + row.height + 0.03, note, 8, ha="center")
            top += row.num_lines * (row.height + NOTE + GAP)

    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    for i, kind in enumerate(kinds):
        colormap, meaning = KINDS[kind]
        bar = axes_at(LEFT + i * (width - LEFT) / 2, height - BOTTOM + 0.15, 2.7, 0.12)
        figure.colorbar(ScalarMappable(cmap=colormap), cax=bar, orientation="horizontal")
        bar.tick_params(labelsize=8)
        bar.set_xlabel(meaning, fontsize=9)
    figure.savefig(path, dpi=150)


def _left_of(column: int) -> float:
    """Return where a map begins in inches; the picture of what the network sees is to the left of the first."""
    return LEFT + (column + 1) * (CELL + GAP) + GAP


def _show(axes, picture: Image.Image | np.ndarray, row: DecayRow, **colors) -> None:
    """Draw an image or a map in the grid's coordinates, with the patch marked."""
    from matplotlib.patches import Rectangle

    rows, columns = row.maps.shape[1:]
    axes.imshow(picture, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest", **colors)
    side = max(1, MIN_MARK * columns)
    y, x = (i + 0.5 - side / 2 for i in row.patch)
    axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=MARK, linewidth=1.5, clip_on=False))
    axes.set_xticks([])
    axes.set_yticks([])


@dataclass(kw_only=True)
class DecayArguments(PipelineArguments):
    """Which decays to draw, and for what; how to sample is for generators."""

    model: str = field(metadata={"help": "Folder or Hub name of a classifier (with --image) or of a pipeline."})
    output: Path = field(metadata={"help": "PNG file for the picture."})
    image: Path | None = field(default=None, metadata={"help": "Image to show to a classifier."})
    timestep: list[float] = field(
        default_factory=list,
        metadata={"help": "Timesteps to which to noise a generator's sample."} | between(0, 1_000_000),
    )
    class_label: str | None = field(default=None, metadata={"help": "Id or name of the class to sample."})
    blocks: list[int] = field(
        default_factory=list,
        metadata={"help": "Blocks, from 0; the first, middle and last by default."} | between(0, 100_000),
    )
    patches: list[str] = field(
        default_factory=list,
        metadata={"help": "Patches to look from, such as 3,4 for row 3, column 4 of the first block's grid."},
    )
    attention: bool = field(default=False, metadata={"help": "Also draw the attention that results."})


@dataclass
class RecordedInput:
    """One input of a network, and the decays that its blocks had for it.

    Args:
        label: Text that distinguishes it from other inputs.
        picture: What the network sees.
        decays: One for each block that is drawn.
    """

    label: str
    picture: Image.Image
    decays: list[BlockDecay]


@dataclass
class Recording:
    """A network and everything that is drawn of it."""

    title: str
    model: nn.Module
    inputs: list[RecordedInput]


CAPTION = (
    "One map for each head, seen from the marked patch. ½ at n: beyond n patches, decay more than halves attention."
)


@torch.no_grad()
def draw_decays(args: DecayArguments, device: torch.device | str = "cpu") -> None:
    """Draw what the arguments ask for to `output`.

    Raises:
        FileNotFoundError: If a model or an image does not exist.
        OSError: If no file can be written beside `output`.
        ValueError: If the arguments do not fit together or to the model, or the output exists.
    """
    check_new(args.output, ".png")
    if (args.image is None) == (not args.timestep):
        raise ValueError("Give either image, for a classifier, or timestep, for a generator.")
    repeated = sorted({block for block in args.blocks if args.blocks.count(block) > 1})
    if repeated:
        raise ValueError(f"blocks must name each block once; {repeated[0]} is repeated.")
    num_rows = max(len(args.timestep), 1) * (len(args.blocks) or 3) * (len(args.patches) or 2) * (1 + args.attention)
    if num_rows > MAX_ROWS:
        raise ValueError(f"The picture would have {num_rows} rows, at most {MAX_ROWS}: give fewer blocks or patches.")
    check_writable(args.output.parent)
    recording = record_image(args, args.image, device) if args.image is not None else record_samples(args, device)
    inputs = recording.inputs
    grid_size = inputs[0].decays[0].grid_size
    patches = parse_patches(args.patches, grid_size, default=2 if len(inputs) == 1 else 1)
    sections = [
        DecaySection(
            decays[0].describe(),
            [
                row
                for each, decay in zip(inputs, decays, strict=True)
                for row in decay_rows(each, decay, patches, grid_size, args.attention)
            ],
        )
        for decays in zip(*(each.decays for each in inputs), strict=True)
    ]
    weights = f"{type(recording.model).__name__}, weights {fingerprint(recording.model)}"
    drawn = describe_blocks([decay.block for decay in inputs[0].decays], recording.model)
    caption = f"{weights}; {drawn}\n{CAPTION}"
    write_atomically(args.output, lambda path: plot_decays(sections, recording.title, caption, path))


def describe_blocks(drawn: Sequence[int], model: nn.Module) -> str:
    """Say which blocks of a model a picture shows, and how many there are."""
    total = sum(isinstance(module, SDTAttention) for module in model.modules())
    if len(drawn) == total:
        return f"all {total} blocks"
    return f"block{'s' * (len(drawn) > 1)} {', '.join(map(str, sorted(drawn)))} of {total} (0 to {total - 1})"


def record_image(args: DecayArguments, image: Path, device: torch.device | str) -> Recording:
    """Record the decays of a classifier for an image."""
    model, processor = load_classifier(args.model, args.dtype, device)
    num_channels = channels_of(model)
    image_mode = image_mode_for(num_channels)
    if not image.is_file():  # a named pipe would wait for a writer
        raise FileNotFoundError(f"image {image} cannot be read: there is no such file.")
    try:
        with Image.open(image) as opened:
            check_bit_depth(opened)
            picture = opened.convert(image_mode)
        pixel_values = prepare_picture(picture, processor, num_channels)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"image {image}: {one_line(error)}") from error
    with record_decays(model, args.blocks, args.attention) as decays:
        inputs = pixel_values[None].to(device, model.dtype)
        with refused_as(f"{args.model} does not take what its image processor makes"):
            probabilities = model(inputs).logits[0].float().softmax(dim=0)
    best = int(probabilities.argmax())
    title = f"{image.name}, taken for {model.config.id2label[best]!r} ({float(probabilities[best]):.0%})"
    return Recording(title, model, [RecordedInput("", undo_normalization(pixel_values, processor), decays)])


def record_samples(args: DecayArguments, device: torch.device | str) -> Recording:
    """Record the decays of a generator for a sample of its own, noised to each timestep."""
    pipe = load_pipeline(args, device)
    pipe.transformer.eval()
    if args.class_label is None:
        raise ValueError("Give class_label, the class that the generator samples.")
    (label,) = parse_classes(pipe, [args.class_label])
    scales = [noise_scales(pipe.scheduler, timestep) for timestep in args.timestep]
    ((_, clean),) = generate(pipe, [label], output_type="latent", progress=False, **args.settings(pipe))
    noise = torch.randn(clean.shape, generator=torch_generator(Stream.NOISED_SAMPLE, args.seed, 0)).to(clean)
    inputs = []
    for timestep, (signal_scale, noise_scale) in zip(args.timestep, scales, strict=True):
        noised = (signal_scale * clean + noise_scale * noise)[None]  # (1, C, H, W)
        with record_decays(pipe.transformer, args.blocks, args.attention) as decays:
            model_input = noised.to(pipe.transformer.dtype)
            pipe.transformer(
                model_input, torch.tensor([timestep], device=device), torch.tensor([label], device=device)
            )
        pixels = noised if pipe.vae is None else decode_latents(pipe.vae, noised)
        (picture,) = pipe.image_processor.postprocess(pixels)
        inputs.append(RecordedInput(f"t = {timestep:g}", picture, decays))
    name = pipe.id2label.get(label, str(label))
    return Recording(f"a sample of the class {name!r}, seed {args.seed}", pipe.transformer, inputs)


def parse_patches(texts: Sequence[str], grid_size: tuple[int, int], default: int) -> list[tuple[int, int]]:
    """Return patches from texts such as "3,4" (row and column).

    Args:
        texts: The texts; without any, the patches are the center and one nearer to a corner.
        grid_size: Rows and columns of the grid.
        default: How many patches to return without texts, 1 or 2.

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
            raise ValueError(f"patches {text!r}: give row and column, such as 3,4.")
        y, x = map(int, parts)
        if y >= rows or x >= columns:
            raise ValueError(f"patches {text!r}: the grid of the first block is {rows} x {columns}, counted from 0.")
        patches.append((y, x))
    return patches


def decay_rows(
    recorded: RecordedInput,
    decay: BlockDecay,
    patches: Sequence[tuple[int, int]],
    patches_grid: tuple[int, int],
    attention: bool,
) -> Iterator[DecayRow]:
    """Yield the rows of the picture for one input; patches of another grid are moved to this block's."""
    (old_rows, old_columns), (rows, columns) = patches_grid, decay.grid_size
    patches = [(int((y + 0.5) / old_rows * rows), int((x + 0.5) / old_columns * columns)) for y, x in patches]
    factors, halves = decay_maps(decay, patches).cpu().numpy(), half_distances(decay, patches)
    for i, patch in enumerate(patches):
        heads = [f"head {head}" for head in range(len(factors[i]))]
        where = f"{recorded.label}\npatch {patch[0]},{patch[1]}".strip()
        notes = heads
        if halves is not None:
            notes = [
                f"{head}, ½ at {_format_distance(float(half))}" for head, half in zip(heads, halves[i], strict=True)
            ]
        yield DecayRow("decay", where, recorded.picture, patch, factors[i], notes)
        if attention:
            shares = attention_maps(decay, patches[i : i + 1])[0].cpu().numpy()
            highest = shares.max(axis=(1, 2))
            notes = [f"{head}, max {share:.2g}" for head, share in zip(heads, highest, strict=True)]
            yield DecayRow("attention", "attention", None, patch, shares / highest[:, None, None], notes)


def _format_distance(patches: float) -> str:
    return f"{patches:.1f}" if patches < 10 else f"{patches:.0f}"


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; `argv` is the command line's by default."""
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse_arguments((DecayArguments,), argv, description=__doc__)
    draw_decays(args, default_device())
    print(f"Written to {args.output}.")


if __name__ == "__main__":
    main()
