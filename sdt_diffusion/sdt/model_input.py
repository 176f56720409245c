"""What a diffusion transformer takes."""

from typing import Any

import torch


def check_input(config: Any, hidden_states: torch.Tensor, class_labels: torch.Tensor) -> tuple[int, int]:
    """Refuse images and labels that do not fit a model; return height and width.

    Args:
        config: The model's config.
        hidden_states: Shape (batch, channels, height, width).
        class_labels: Shape (batch,).

    Raises:
        ValueError: Says what does not fit.
    """
    channels, height, width = hidden_states.shape[1:]
    if channels != config.in_channels:
        raise ValueError(f"The model takes {config.in_channels} channels, but the input has {channels}.")
    if height % config.patch_size or width % config.patch_size:
        raise ValueError(
            f"An input of {height}x{width} is not divisible by the model's patch_size {config.patch_size}."
        )
    if class_labels.shape != hidden_states.shape[:1]:
        raise ValueError(
            f"{hidden_states.shape[0]} inputs need as many class labels, not a tensor of shape "
            f"{tuple(class_labels.shape)}."
        )
    # Check values on the CPU only: reading them from an accelerator would stall it, and there pipelines and data
    # sets have checked them.
    if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
        null_class = config.num_classes
        if class_labels.numel() and not 0 <= int(class_labels.min()) <= int(class_labels.max()) <= null_class:
            raise ValueError(
                f"Class labels must lie in 0..{null_class} ({null_class} is the null class), got "
                f"{int(class_labels.min())}..{int(class_labels.max())}."
            )
    return height, width
