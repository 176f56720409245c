"""Use attention with spatial decay in a module of your own: `python examples/attention_in_your_own_model.py`.

The subpackage `sdt_diffusion.attention` needs torch only. This module takes any feature map; nothing in it is a
diffusion model.
"""

import torch
from torch import nn

from sdt_diffusion.attention import build_gate, spatial_decay_attention


class DecayAttention2d(nn.Module):
    """Attend over the pixels of a feature map, less to those far away."""

    def __init__(self, channels: int, num_heads: int, variant: str = "context"):
        super().__init__()
        self.num_heads, self.variant = num_heads, variant
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.gate = build_gate(variant, channels, num_heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W)
        grid_size = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # (B, H*W, C)
        query, key, value = self.to_qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        gate, alpha = self.gate(tokens)  # (B, heads, H*W) and (heads,)
        out = spatial_decay_attention(query, key, value, gate, alpha, grid_size, variant=self.variant)
        return x + self.to_out(out.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(-1, grid_size)


if __name__ == "__main__":
    torch.manual_seed(0)
    layer = DecayAttention2d(channels=32, num_heads=4)
    features = torch.randn(2, 32, 12, 16)
    loss = layer(features).square().mean()
    loss.backward()
    print(f"{tuple(features.shape)} -> {tuple(layer(features).shape)}")
    print(f"The gate learns where to look: its gradient has norm {layer.gate.proj.weight.grad.norm():.1e}.")
