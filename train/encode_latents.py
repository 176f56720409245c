"""Encode images into a cache of latents: `accelerate launch train/encode_latents.py --help`."""

from sdt_diffusion.data.latents.encode import main

if __name__ == "__main__":
    main()
