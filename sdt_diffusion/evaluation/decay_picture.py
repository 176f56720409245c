"""From a model and what it is shown to a picture of its decays."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from ..data.decoding import check_bit_depth
from ..files import check_new, check_writable, write_atomically
from ..fingerprint import fingerprint
from ..generation import generate, sample_generator
from ..metrics.extractors.transformers_models import channels_of, load_classifier
from ..plots import DecayRow, DecaySection, plot_decays
from ..sdt.latents import decode_latents
from ..sdt.schedulers import noise_scales
from .arguments import DecayArguments
from .decay import BlockDecay, attention_maps, decay_maps, half_distances, record_decays
from .pictures import image_mode_for, prepare_picture, undo_normalisation

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
    return title, model, [("", undo_normalisation(pixel_values, processor), decays)]


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
    noise = torch.randn(clean.shape, generator=sample_generator(args.seed, 1)).to(clean)
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
