"""Dense backend: the formula with its gradient written out, holding one (tokens, tokens) tensor per head."""

import torch
from torch.autograd.function import once_differentiable

from .formula import manhattan_distance, reference_attention


class _DenseAttention(torch.autograd.Function):
    """softmax(Q K^T * scale + (u_i + u_j) d_ij) V, with u = 1/2 alpha G <= 0, so that the bias is M without its abs.

    A compiler fuses bias and softmax. Backward, with P the attention and S the logits: dS = P * (dP - sum_j dP P),
    du_i = sum_j (dS_ij + dS_ji) d_ij; autograd carries du on to the gate and alpha.
    """

    @staticmethod
    def forward(ctx, query, key, value, half_decay, distance, scale):
        logits = (half_decay[..., :, None] + half_decay[..., None, :]).mul_(distance)
        logits = logits.add_(query @ key.transpose(-1, -2), alpha=scale)  # in the decay's fp32, also under autocast
        attention = torch.softmax(logits, dim=-1).to(value.dtype)
        output = attention @ value
        ctx.save_for_backward(query, key, value, attention, output, distance)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, attention, output, distance = ctx.saved_tensors
        grad_output = grad_output.to(value.dtype)
        grad_value = attention.transpose(-1, -2) @ grad_output
        row_sum = (grad_output.to(distance.dtype) * output).sum(dim=-1, keepdim=True)  # sum_j dP_ij P_ij
        grad_logits = (grad_output @ value.transpose(-1, -2)).to(distance.dtype)
        grad_logits = grad_logits.sub_(row_sum).mul_(attention)
        grad_scores = grad_logits.to(query.dtype)
        grad_query = (grad_scores @ key).mul_(ctx.scale)
        grad_key = (grad_scores.transpose(-1, -2) @ query).mul_(ctx.scale)
        grad_half_decay = None
        if ctx.needs_input_grad[3]:
            weighted = grad_logits.mul_(distance)  # in place: its last use
            grad_half_decay = weighted.sum(dim=-1) + weighted.sum(dim=-2)
        return grad_query, grad_key, grad_value, grad_half_decay, None, None


def dense_attention(query, key, value, gate, alpha, grid_size, variant, scale):
    """Spatial decay attention on materialised logits; `raster`, whose decay is no product with a distance, by formula.

    Needs gate <= 0 and alpha > 0, which the gate's log sigmoid and exp guarantee.
    """
    if variant == "raster":
        return reference_attention(query, key, value, gate, alpha, grid_size, variant, scale)
    return _DenseAttention.apply(query, key, value, *half_decay_and_distance(gate, alpha, grid_size, variant), scale)


def half_decay_and_distance(gate, alpha, grid_size, variant):
    """u = 1/2 alpha G, shape (batch, heads, tokens), and d, shape (tokens, tokens): M_ij = (u_i + u_j) d_ij."""
    distance = manhattan_distance(grid_size, gate.device, gate.dtype)
    if variant == "content":
        distance = distance.clamp(max=1)
    half_decay = gate * (alpha[:, None] / 2)
    return half_decay.contiguous(), distance  # or the logits would inherit the gate's strides
