"""Factored backend: the decay as further columns of query and key, for kernels that add nothing to the logits.

The distance between two tokens is the number of lines of the grid between them: of its n = (H-1) + (W-1) lines, those
that exactly one of the two is beyond. With b_t(i) = 1 if token i is beyond line t, else 0,

    d_ij = sum_t b_t(i) (1 - b_t(j)) + (1 - b_t(i)) b_t(j) = x_i . y_j    with x = [b, 1 - b], y = [1 - b, b]
    M_ij = (u_i + u_j) d_ij = [u_i x_i, y_i] . [y_j, u_j x_j]             with u = 1/2 alpha G

so M is an inner product of 4 n columns. Any attention without a mask computes the formula with them, and by autograd
its gradients, in memory that grows with the tokens only. All terms have one sign, so nothing cancels: in low precision
only u is rounded. The columns come first, because weak decays would be lost bit by bit if added to the sum of Q K^T.

With signs s = 1 - 2b, d_ij = n/2 - 1/2 s_i . s_j, and x = [1, -s/2], y = [n/2, s] make 2 (n + 1) columns. There
terms cancel. In half precision that leaves the output as good, as products are exact and summed in fp32, but not the
gradient of u. So the narrow form serves where the other is too wide, in half precision, without that gradient.
"""

import torch
import torch.nn.functional as F

from .formula import Decay

#: Columns of the widest heads that torch's and Dao's flash kernels take on GPUs.
MAX_WIDTH = 256


def factored_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: Decay, scale: float
) -> torch.Tensor:
    """Compute spatial decay attention by torch's fused attention without a mask.

    Raises:
        ValueError: If the variant has no such factors, or the heads become too wide; says what to do.
    """
    max_width = None if query.device.type == "cpu" else MAX_WIDTH
    factors = add_decay_columns(query, key, value, decay, scale, max_width)
    return F.scaled_dot_product_attention(*factors, scale=scale)[..., : value.shape[-1]]  # (B, h, N, d)


def add_decay_columns(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: Decay,
    scale: float,
    max_width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value whose plain attention is spatial decay attention.

    Args:
        query: Shape (batch, heads, tokens, head_dim).
        key: Likewise.
        value: Shape (batch, heads, tokens, value_dim).
        decay: The decay, of the variant `context` or `fixed`.
        scale: Factor of Q K^T, to be given to the attention as well.
        max_width: Columns that the attention can take; `None` for any number.

    Returns:
        Tensors of shape (batch, heads, tokens, width), all of one width, a multiple of 8. The first value_dim columns
        of their attention are the output, the others zero.

    Raises:
        ValueError: If the variant has no such factors, or `width` exceeds `max_width`; says what to do.
    """
    if decay.variant not in ("context", "fixed"):
        raise ValueError(
            f"The backend 'factored' computes the variants 'context' and 'fixed', not {decay.variant!r}, which is no "
            "product with the distance: choose 'dense'."
        )
    left, right = _of_tokens(decay, _distance_factors(decay.grid_size, query.device))  # (N, 2 (H+W-2)) each
    width = _width(query, value, left)
    if max_width is not None and width > max_width:
        left, right = _of_tokens(decay, _narrow_distance_factors(decay.grid_size, query.device))  # (N, H+W-1) each
        wide, width = width, _width(query, value, left)
        trains = torch.is_grad_enabled() and (decay.gate.requires_grad or decay.alpha.requires_grad)
        if width > max_width or trains or query.dtype not in (torch.bfloat16, torch.float16):
            height, columns = decay.grid_size
            raise ValueError(
                f"The backend 'factored' needs heads of {wide} columns on a grid of {height}x{columns} ({width} in "
                f"half precision without the gate's gradient), but the kernel takes {max_width}: choose 'triton' or "
                "'dense'."
            )

    half_decay = decay.gate * (decay.alpha[:, None] / (2 * scale))  # (B, h, N), fp32
    if query.dtype == torch.float16:  # beyond, M is infinite for the softmax anyway
        half_decay = half_decay.clamp(min=-60_000)
    weighted = (half_decay[..., None] * left).to(query.dtype)  # (B, h, N, n)
    right = right.to(query.dtype).expand_as(weighted)
    rest = query.new_zeros(()).expand(*query.shape[:-1], width - query.shape[-1] - 2 * left.shape[-1])
    query = torch.cat([weighted, right, query, rest], dim=-1)  # (B, h, N, width)
    key = torch.cat([right, weighted, key, rest], dim=-1)
    return query, key, F.pad(value, (0, width - value.shape[-1]))


def _beyond(grid_size, device):
    """Return which lines of the grid each token is beyond, shape (tokens, lines): 0 or 1."""
    height, width = grid_size
    tokens = torch.arange(height * width, device=device)[:, None]
    rows = tokens // width >= torch.arange(1, height, device=device)
    columns = tokens % width >= torch.arange(1, width, device=device)
    return torch.cat([rows, columns], dim=1).float()


def _distance_factors(grid_size, device):
    """Return x and y with d_ij = x_i . y_j = y_i . x_j."""
    beyond = _beyond(grid_size, device)
    return torch.cat([beyond, 1 - beyond], dim=1), torch.cat([1 - beyond, beyond], dim=1)


def _narrow_distance_factors(grid_size, device):
    """Return the same in half as many columns and one."""
    sign = 1 - 2 * _beyond(grid_size, device)
    ones = torch.ones_like(sign[:, :1])
    return torch.cat([ones, -sign / 2], dim=1), torch.cat([ones * sign.shape[1] / 2, sign], dim=1)


def _of_tokens(decay, factors):
    """Return the factors of registers, 0 as their distances, and of the tokens, from those of the whole grid."""
    factors = factors if decay.places is None else [x[decay.places] for x in factors]
    return [F.pad(x, (0, 0, decay.num_registers, 0)) for x in factors]


def _width(query, value, left):
    width = max(query.shape[-1] + 2 * left.shape[-1], value.shape[-1])
    return -(-width // 8) * 8  # as kernels want it
