"""The paper's formula, in its most readable form.

Source: "Learning Spatial Decay for Vision Transformers" (SDT, arXiv 2508.09525); the `fixed` variant is the decay of
"RMT: Retentive Networks Meet Vision Transformers" (CVPR 2024).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


def manhattan_distance(
    grid_size: tuple[int, int], device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the Manhattan distance between all pairs of tokens of a grid.

    d_ij = |y_i - y_j| + |x_i - x_j| with token n at row y = n // W and column x = n % W (raster order).

    Args:
        grid_size: Rows H and columns W of the patch grid.
        device: Device of the result.
        dtype: Data type of the result.

    Returns:
        Tensor of shape (H*W, H*W), in units of patches.
    """
    height, width = grid_size
    y = torch.arange(height, device=device, dtype=dtype)
    x = torch.arange(width, device=device, dtype=dtype)
    rows = (y[:, None] - y[None, :]).abs()  # (H, H)
    columns = (x[:, None] - x[None, :]).abs()  # (W, W)
    distance = rows[:, None, :, None] + columns[None, :, None, :]  # (H, W, H, W)
    return distance.reshape(height * width, height * width)  # (N, N)


#: Values of the config key `spatial_decay`: how attention decays between two tokens.
SPATIAL_DECAY_VARIANTS = {
    "context": "gates from the tokens' content times the Manhattan distance (SDT)",
    "fixed": "one constant gate per head times the Manhattan distance (RMT)",
    "content": "gates from the tokens' content, the same for every distance",
    "raster": "gates summed along the raster order between the two tokens (1D decay)",
    "none": "no decay: plain attention",
}


def check_variant(variant: str) -> str:
    """Return `variant` if it is a known spatial decay.

    Raises:
        ValueError: If it is not; the message lists the known ones.
    """
    if not isinstance(variant, str) or variant not in SPATIAL_DECAY_VARIANTS:
        raise ValueError(f"Unknown spatial_decay {variant!r}: choose one of {', '.join(SPATIAL_DECAY_VARIANTS)}.")
    return variant


def spatial_decay(
    gate: torch.Tensor,
    alpha: torch.Tensor,
    grid_size: tuple[int, int],
    variant: str = "context",
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the decay M that is added to the attention logits.

        context, fixed:  M_ij = -| 1/2 (G_i + G_j) * d_ij * alpha |
        content:         the same with d_ij = 1 for i != j
        raster:          M_ij = -| sum of G between i and j in raster order * alpha |

    Args:
        gate: G = log sigmoid(decay logits) <= 0, shape (batch, heads, tokens).
        alpha: Strength of the decay, > 0, shape (heads,).
        grid_size: Rows and columns of the patch grid; their product is the number of tokens.
        variant: One of `SPATIAL_DECAY_VARIANTS` except `none`.
        places: Where on the grid the tokens are, in raster order, shape (tokens,), if they are only some of it.

    Returns:
        M of shape (batch, heads, tokens, tokens): <= 0, symmetric, zero on the diagonal, in the gate's dtype.

    Raises:
        ValueError: If the variant is `raster` and there are `places`: its sums need the gates of all tokens.
    """
    alpha = alpha[:, None, None]  # (h, 1, 1)
    if variant == "raster":
        if places is not None:
            raise ValueError("The variant 'raster' sums the gates of all tokens: it takes no places of some of them.")
        position = gate.cumsum(dim=-1)  # (B, h, N)
        return -((position[..., :, None] - position[..., None, :]) * alpha).abs()  # (B, h, N, N)
    distance = _distance(grid_size, variant, places, gate)  # (N, N)
    pair = (gate[..., :, None] + gate[..., None, :]) / 2  # (B, h, N, N)
    return -(pair * distance * alpha).abs()


def _distance(grid_size, variant, places, gate):
    distance = manhattan_distance(grid_size, gate.device, gate.dtype)
    if places is not None:
        distance = distance[places][:, places]
    return distance.clamp(max=1) if variant == "content" else distance


class Decay(NamedTuple):
    """The components of a spatial decay, as backends receive them.

    Args:
        gate: G = log sigmoid(decay logits) <= 0 in fp32 or fp64, shape (batch, heads, tokens).
        alpha: Strength of the decay, > 0, shape (heads,).
        grid_size: Rows and columns of the patch grid; their product is the number of tokens that are no registers.
        variant: One of `SPATIAL_DECAY_VARIANTS` except `none`.
        prune_eps: Share of each query's softmax that a backend may skip, as `pruning` describes; 0 for none.
        num_registers: First tokens, which are not on the grid: M is 0 in their rows and columns.
        places: Where on the grid the tokens after them are, in raster order, if they are only some of it.
    """

    gate: torch.Tensor
    alpha: torch.Tensor
    grid_size: tuple[int, int]
    variant: str = "context"
    prune_eps: float = 0.0
    num_registers: int = 0
    places: torch.Tensor | None = None

    def bias(self) -> torch.Tensor:
        """Return M, the additive mask of shape (batch, heads, tokens, tokens), for any variant."""
        on_grid = self.gate[..., self.num_registers :]
        decay = spatial_decay(on_grid, self.alpha, self.grid_size, self.variant, self.places)
        return F.pad(decay, (self.num_registers, 0) * 2) if self.num_registers else decay

    @property
    def clamp(self) -> bool:
        """Whether distances are at most 1."""
        return self.variant == "content"

    def half_decay(self) -> torch.Tensor:
        """Return u = 1/2 alpha G, shape (batch, heads, tokens), of which M_ij = (u_i + u_j) d_ij.

        Fast backends compute M so, without writing it to memory. Needs gate <= 0 and alpha > 0, which the gate's log
        sigmoid and exp guarantee: M is then negative without abs.

        Raises:
            ValueError: If the variant is `raster`, which is not a product with a distance.
        """
        if self.variant == "raster":
            raise ValueError("The variant 'raster' has no distance to factor out: use `bias()`.")
        half_decay = self.gate * (self.alpha[:, None] / 2)  # (B, h, N)
        return half_decay.contiguous()  # otherwise the logits would inherit the gate's strides

    def half_decay_and_distance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return u, and d of shape (tokens, tokens); see `half_decay`."""
        half_decay = self.half_decay()
        distance = _distance(self.grid_size, self.variant, self.places, self.gate)  # (N, N)
        return half_decay, F.pad(distance, (self.num_registers, 0) * 2) if self.num_registers else distance


def reference_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: Decay | None, scale: float
) -> torch.Tensor:
    """Compute softmax(Q K^T * scale + M) V by plain differentiable operations.

    All other backends are tested against this one. It supports higher derivatives and forward-mode differentiation,
    and keeps several (tokens, tokens) tensors per head for the backward pass.
    """
    logits = (query @ key.transpose(-1, -2)) * scale  # (B, h, N, N)
    if decay is not None:
        logits = logits + decay.bias()
    return logits.softmax(dim=-1).to(value.dtype) @ value  # (B, h, N, d)
