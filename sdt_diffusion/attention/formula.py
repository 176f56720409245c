"""The paper's formula, written to be read.

Source: "Learning Spatial Decay for Vision Transformers" (SDT, arXiv 2508.09525); the `fixed` variant is the decay of
"RMT: Retentive Networks Meet Vision Transformers" (CVPR 2024).
"""

import torch


def manhattan_distance(
    grid_size: tuple[int, int], device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Manhattan distance between all pairs of tokens of a grid.

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
    rows = (y[:, None] - y[None, :]).abs()
    columns = (x[:, None] - x[None, :]).abs()
    return (rows[:, None, :, None] + columns[None, :, None, :]).reshape(height * width, height * width)


#: Values of the config key `spatial_decay`: how attention decays between two tokens.
SPATIAL_DECAY_VARIANTS = {
    "context": "gates from the tokens' content times the Manhattan distance (SDT)",
    "fixed": "one constant gate per head times the Manhattan distance (RMT)",
    "content": "gates from the tokens' content, the same for every distance",
    "raster": "gates summed along the raster order between the two tokens (1D decay)",
    "none": "no decay: plain attention",
}


def check_variant(variant: str) -> str:
    """Returns `variant` if it is a known spatial decay.

    Raises:
        ValueError: If it is not; the message lists the known ones.
    """
    if variant not in SPATIAL_DECAY_VARIANTS:
        raise ValueError(f"Unknown spatial_decay {variant!r}: choose one of {', '.join(SPATIAL_DECAY_VARIANTS)}.")
    return variant


def spatial_decay(
    gate: torch.Tensor, alpha: torch.Tensor, grid_size: tuple[int, int], variant: str = "context"
) -> torch.Tensor:
    """The decay M that is added to the attention logits.

        context, fixed:  M_ij = -| 1/2 (G_i + G_j) * d_ij * alpha |
        content:         the same with d_ij = 1 for i != j
        raster:          M_ij = -| sum of G between i and j in raster order * alpha |

    Args:
        gate: G = log sigmoid(decay logits) <= 0, shape (batch, heads, tokens).
        alpha: Strength of the decay, > 0, shape (heads,).
        grid_size: Rows and columns of the patch grid; their product is the number of tokens.
        variant: One of `SPATIAL_DECAY_VARIANTS` except `none`.

    Returns:
        M of shape (batch, heads, tokens, tokens): <= 0, symmetric, zero on the diagonal, in the gate's dtype.
    """
    alpha = alpha[:, None, None]
    if variant == "raster":
        position = gate.cumsum(dim=-1)
        return -((position[..., :, None] - position[..., None, :]) * alpha).abs()
    distance = manhattan_distance(grid_size, gate.device, gate.dtype)
    if variant == "content":
        distance = distance.clamp(max=1)
    pair = (gate[..., :, None] + gate[..., None, :]) / 2
    return -(pair * distance * alpha).abs()


def reference_attention(query, key, value, gate, alpha, grid_size, variant, scale):
    """softmax(Q K^T * scale + M) V by plain differentiable operations.

    The backend every other one is tested against. It differentiates any number of times and in forward mode, and holds
    several (tokens, tokens) tensors per head for the backward pass.
    """
    logits = (query @ key.transpose(-1, -2)) * scale
    if variant != "none":
        logits = logits + spatial_decay(gate, alpha, grid_size, variant)
    return logits.softmax(dim=-1).to(value.dtype) @ value
