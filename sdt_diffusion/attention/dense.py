"""Dense backend: the formula with its gradient written out, holding one (tokens, tokens) tensor per head."""

import torch
from torch.autograd.function import once_differentiable

from .formula import Decay


class _DenseAttention(torch.autograd.Function):
    """Computes softmax(Q K^T * scale + (u_i + u_j) d_ij) V, with u and d of `Decay.half_decay_and_distance`.

    A compiler fuses bias and softmax. Backward, with P the attention and S the logits: dS = P * (dP - sum_j dP P),
    du_i = sum_j (dS_ij + dS_ji) d_ij; autograd carries du on to the gate and alpha.
    """

    @staticmethod
    def forward(ctx, query, key, value, half_decay, distance, scale):
        logits = (half_decay[..., :, None] + half_decay[..., None, :]).mul_(distance)  # (B, h, N, N)
        logits = logits.add_(query @ key.transpose(-1, -2), alpha=scale)  # in the decay's fp32, also under autocast
        attention = torch.softmax(logits, dim=-1).to(value.dtype)
        output = attention @ value  # (B, h, N, d)
        ctx.save_for_backward(query, key, value, attention, distance)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, attention, distance = ctx.saved_tensors
        grad_output = grad_output.to(value.dtype)
        grad_value = attention.transpose(-1, -2) @ grad_output
        grad_logits = (grad_output @ value.transpose(-1, -2)).to(distance.dtype)  # (B, h, N, N)
        # From the product of the output and its gradient, rounded otherwise, a row of one large P_ij would be noise.
        row_sum = (grad_logits * attention).sum(dim=-1, keepdim=True)  # sum_j dP_ij P_ij, (B, h, N, 1)
        grad_logits = grad_logits.sub_(row_sum).mul_(attention)
        grad_scores = grad_logits.to(query.dtype)
        grad_query = (grad_scores @ key).mul_(ctx.scale)
        grad_key = (grad_scores.transpose(-1, -2) @ query).mul_(ctx.scale)
        grad_half_decay = None
        if ctx.needs_input_grad[3]:
            weighted = grad_logits.mul_(distance)  # in place, as nothing reads grad_logits later
            grad_half_decay = weighted.sum(dim=-1) + weighted.sum(dim=-2)  # (B, h, N)
        return grad_query, grad_key, grad_value, grad_half_decay, None, None


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: Decay, scale: float
) -> torch.Tensor:
    """Compute spatial decay attention on materialized logits."""
    return _DenseAttention.apply(query, key, value, *decay.half_decay_and_distance(), scale)
