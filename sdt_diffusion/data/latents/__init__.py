"""Latents of a VAE: encode images into a cache, and read it (or encode on the fly) for training."""
