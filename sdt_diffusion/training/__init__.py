"""What all training scripts share: arguments, the loop, checkpoints, averaging; and the diffusion objectives."""
