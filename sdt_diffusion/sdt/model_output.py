"""What `SDTTransformer2DModel` returns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

#: Smallest sigma by which a flow is divided, as in JiT.
MIN_SIGMA = 0.05


@dataclass
class SDTTransformer2DModelOutput(Transformer2DModelOutput):
    """The prediction of a transformer, and what its blocks put out.

    Args:
        sample: The prediction, shape (batch, out_channels, height, width).
        block_outputs: The patches after each block that was asked for, shape (batch, patches, width); `None` for none.
    """

    block_outputs: tuple[torch.Tensor, ...] | None = None


def check_blocks(blocks: Sequence[int], num_blocks: int) -> None:
    """Refuse numbers of blocks that a model does not have.

    Raises:
        ValueError: Names the first one.
    """
    if not isinstance(blocks, Sequence):
        raise ValueError(f"block_outputs must be a list of blocks, not {blocks!r}.")
    for block in blocks:
        if not isinstance(block, int) or isinstance(block, bool) or not 0 <= block < num_blocks:
            raise ValueError(f"A block must be one of 0..{num_blocks - 1} of this model, not {block!r}.")


def flow_of_clean(clean: torch.Tensor, noised: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return the flow (z - x) / max(sigma, 0.05) of a predicted clean image, computed in fp32 or better.

    With z = (1 - sigma) x + sigma noise that is noise - x. Below sigma 0.05 it is (noise - x) sigma / 0.05, as the
    division would magnify the error of the prediction without limit ("Back to Basics: Let Denoising Generative Models
    Denoise", arXiv 2511.13720).

    Args:
        clean: x, shape (batch, channels, height, width).
        noised: z, likewise.
        timestep: 1000 sigma, shape (batch,) or a scalar.

    Returns:
        The flow, in the dtype of `noised`.
    """
    dtype = torch.promote_types(noised.dtype, torch.float32)
    sigma = (timestep.to(dtype) / 1000).clamp(min=MIN_SIGMA).reshape(-1, 1, 1, 1)  # (B, 1, 1, 1)
    return ((noised.to(dtype) - clean.to(dtype)) / sigma).to(noised.dtype)
