"""Convert models of DiT, SiT, LightningDiT and diffusers to pipelines of this package with the same outputs, and back.

    sdt-diffusion convert DiT-XL-2-256x256.pt dit --kind dit --vae VAE       # facebookresearch/DiT
    sdt-diffusion convert SiT-XL-2-256.pt sit --kind sit --vae VAE           # willisma/SiT
    sdt-diffusion convert lightningdit-xl-imagenet256-800ep.pt lightning     # hustvl/LightningDiT
    sdt-diffusion convert DiT-XL-2-256 dit                                   # a folder of diffusers' DiTPipeline
    sdt-diffusion convert outputs/plain plain.safetensors --to dit           # back, without spatial decay

The first two words are the source and the destination. The decay of the pipeline starts so weak that the outputs are
those of the source, and training can strengthen it: `train/train_dit.py --init_from`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..data.latents.training_data import load_vae
from ..sdt.loading import open_pipeline
from ..utils.arguments import exit_on_error, parse_arguments
from ..utils.files import check_new
from ..utils.ranges import CheckedArguments, between
from .assemble import (
    build_pipeline,
    check_new_folder,
    describe,
    export,
    read_class_names,
    read_latent_stats,
    read_source,
    save_pipeline,
    save_state_dict,
)


@dataclass(frozen=True)
class ConvertArguments(CheckedArguments):
    """What to convert."""

    source: str = field(metadata={"help": "A .pt or .safetensors file, or a folder; also as the first word."})
    destination: str = field(metadata={"help": "A new folder, or a new file with --to; also as the second word."})
    kind: Literal["dit", "sit", "lightningdit"] | None = field(
        default=None, metadata={"help": "Repository of a file; only LightningDiT's own parts tell it."}
    )
    to: Literal["sdt", "dit", "sit"] = field(
        default="sdt", metadata={"help": "What to write: a pipeline, or the weights of one in DiT's or SiT's layout."}
    )
    spatial_decay: Literal["context", "content", "raster", "none"] = field(
        default="context", metadata={"help": "The decay that training can add; 'none' is the plain model."}
    )
    num_attention_heads: int | None = field(
        default=None,
        metadata={"help": "Heads, which files do not tell. Default: of the published model of that width."}
        | between(1, 1024),
    )
    numerics: Literal["facebook", "diffusers"] = field(
        default="facebook",
        metadata={
            "help": "Timestep features of a diffusers folder: those its weights were trained with are facebook's."
        },
    )
    vae: str | None = field(default=None, metadata={"help": "Folder or Hub name of the VAE of the latents."})
    latent_stats: str | None = field(
        default=None,
        metadata={"help": "LightningDiT's latents_stats.pt: mean and deviation of each channel of the VAE's latents."},
    )
    class_names: str | None = field(
        default=None, metadata={"help": "JSON file with a list of class names, or an object of label ids and names."}
    )


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` is the command line's by default."""
    (args,) = parse_arguments(
        (ConvertArguments,), with_flags(sys.argv[1:] if argv is None else argv), description=__doc__
    )
    source, destination = Path(args.source).expanduser(), Path(args.destination).expanduser()
    if args.to != "sdt":
        check_new(destination, ".pt", ".safetensors")
        save_state_dict(export(open_pipeline(args.source), args.to), destination)
        print(f"Saved the weights in the layout of {args.to} to {destination}")
        return
    check_new_folder(destination)
    read = read_source(source, args.kind, args.num_attention_heads, args.numerics)
    vae = load_vae(args.vae) if args.vae is not None else None
    id2label = read_class_names(Path(args.class_names).expanduser()) if args.class_names is not None else None
    stats = read_latent_stats(Path(args.latent_stats).expanduser()) if args.latent_stats is not None else None
    pipe = build_pipeline(read, args.spatial_decay, vae, id2label, stats)
    print(describe(read, pipe))
    save_pipeline(pipe, destination)
    print(f"Saved the pipeline to {destination}")


def with_flags(argv: Sequence[str]) -> list[str]:
    """Return a command line whose first two words, if they are no flags, have the flags that they stand for."""
    words = list(argv)
    for position, flag in ((0, "--source"), (2, "--destination")):
        if len(words) > position and not words[position].startswith("-"):
            words.insert(position, flag)
    return words


if __name__ == "__main__":
    main()
