"""Predict with a few wide blocks after the backbone, as latents of many channels need (DiT-DH, arXiv 2510.11690)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..blocks import SDTBlock
from .embeddings import SDTPatchEmbed


class WideHead(nn.Module):
    """Blocks that see the noised image in patches of their own, and the backbone's tokens as conditioning.

    A transformer that is narrower than the channels of a patch cannot predict their noise, which fills them; making
    all of it wide costs much more than a head. Each patch is conditioned on SiLU(token + c), where the token is the
    backbone's at its place and c is that of timestep and class; the authors have the timestep alone in place of c.
    Positions come from the tokens, the decay and the rotary embedding.

    Args:
        in_channels: Channels of the image.
        backbone_width: Width of the backbone's tokens.
        width: Width of the head.
        patch_size: Side of a patch.
        grid_size: Rows and columns of the grid that the model is trained on.
        num_layers: Number of blocks.
        **block_options: Options of `SDTBlock` besides the widths; heads are as many as the backbone's.
    """

    def __init__(
        self,
        in_channels: int,
        backbone_width: int,
        width: int,
        patch_size: int,
        grid_size: tuple[int, int],
        num_layers: int,
        **block_options: Any,
    ):
        super().__init__()
        self.pos_embed = SDTPatchEmbed(in_channels, width, patch_size, grid_size, position=False)
        self.conditioning_proj = nn.Linear(backbone_width, width)
        blocks = (SDTBlock(width, conditioning_dim=width, **block_options) for _ in range(num_layers))
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self,
        image: torch.Tensor,
        tokens: torch.Tensor,
        conditioning: torch.Tensor,
        run_block: Callable[..., torch.Tensor],
        grid_size: tuple[int, int],
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        decay_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the blocks.

        Args:
            image: The noised image, shape (batch, channels, height, width).
            tokens: The backbone's patches, shape (batch, patches, backbone_width).
            conditioning: Shape (batch, 1, backbone_width).
            run_block: Calls a block with its inputs.
            grid_size: See `SDTBlock.forward`.
            image_rotary_emb: Likewise, for the head's width.
            decay_scale: Likewise.

        Returns:
            Patches after the last block, and the conditioning of each, both of shape (batch, patches, width).
        """
        conditioning = self.conditioning_proj(F.silu(tokens + conditioning))  # (B, N, W)
        hidden_states = self.pos_embed(image)  # (B, N, W)
        for block in self.blocks:
            hidden_states = run_block(block, hidden_states, grid_size, conditioning, image_rotary_emb, decay_scale)
        return hidden_states, conditioning
