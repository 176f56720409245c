"""Images through a VAE into a cache of latents."""
