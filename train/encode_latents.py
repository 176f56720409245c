"""Encodes the images of a data set, and their mirrors, into a cache of latents that train_dit.py reads.

    accelerate launch train/encode_latents.py --dataset DATA --output_dir CACHE --pretrained_vae_model_name_or_path VAE
    accelerate launch train/encode_latents.py ... --dataset "tars/train-*.tar" --streaming True
    python train/encode_latents.py --output_dir CACHE --verify True

The same command goes on where it was interrupted. preview.png, written with the first shard, shows whether the VAE and
the crop are what they should be.
"""

import sys
from datetime import timedelta

import torch
from accelerate import PartialState
from diffusers import AutoModel

from sdt_diffusion.command_line import errors_in_a_line, parse_arguments
from sdt_diffusion.data.image_rows import open_rows
from sdt_diffusion.data.images import ImageArguments
from sdt_diffusion.data.latent_cache import verify
from sdt_diffusion.latent_encoding.arguments import EncodingArguments
from sdt_diffusion.latent_encoding.encode import encode_into

DEFAULT_RESOLUTION = 256


def main(argv):
    args, image_args = parse_arguments((EncodingArguments, ImageArguments), argv, description=__doc__)
    with errors_in_a_line(ValueError, OSError):
        if args.verify:
            print(f"All {verify(args.output_dir)} shards of {args.output_dir} are as they were written.")
            return
        # Processes wait for each other at the end, where the last may be a shard behind.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        vae = AutoModel.from_pretrained(args.pretrained_vae_model_name_or_path).eval().requires_grad_(False)
        with state.local_main_process_first():  # `datasets` may have to make its copy
            rows = open_rows(image_args, args.streaming, DEFAULT_RESOLUTION)
        manifest = encode_into(args.output_dir, rows, vae, image_args, args)
        if state.is_main_process:
            left_out = manifest["num_unreadable"]
            print(
                f"{manifest['num_images']} images of {len(manifest['class_names'])} classes are in {args.output_dir}"
                + (f"; {left_out} could not be decoded, see manifest.json." if left_out else ".")
            )


if __name__ == "__main__":
    main(sys.argv[1:])
