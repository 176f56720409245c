"""Blockwise backend for CPUs: computes a few heads at a time, so that their logits stay in the cache."""

import torch

from .formula import Decay

#: Bytes of logits to compute at a time; exceeded where fewer heads than threads would fit.
SCRATCH_BYTES = 2**21

# Registered as custom operators because a compiler would unroll the loops.


@torch.library.custom_op("sdt_diffusion::blockwise_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half_decay: torch.Tensor,
    distance: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute the same as the dense backend, one block of samples or heads at a time."""
    output = torch.empty_like(value)
    for block in _blocks(half_decay, distance):
        attention = _attention(query[block], key[block], half_decay[block], distance, scale)  # (b, h', N, N)
        output[block] = attention.to(value.dtype) @ value[block]  # (b, h', N, d)
    return output


@torch.library.custom_op("sdt_diffusion::blockwise_attention_backward", mutates_args=())
def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    half_decay: torch.Tensor,
    distance: torch.Tensor,
    output: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients from recomputed attention, which is cheaper than storing and loading it."""
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    grad_half_decay = torch.empty_like(half_decay)
    for block in _blocks(half_decay, distance):
        attention = _attention(query[block], key[block], half_decay[block], distance, scale)
        grad = grad_output[block]
        grad_value[block] = attention.to(value.dtype).transpose(-1, -2) @ grad
        row_sum = (grad.to(distance.dtype) * output[block]).sum(dim=-1, keepdim=True)  # (b, h', N, 1)
        grad_logits = (grad @ value[block].transpose(-1, -2)).to(distance.dtype).sub_(row_sum).mul_(attention)
        grad_scores = grad_logits.to(query.dtype)
        grad_query[block] = (grad_scores @ key[block]).mul_(scale)
        grad_key[block] = (grad_scores.transpose(-1, -2) @ query[block]).mul_(scale)
        weighted = grad_logits.mul_(distance)
        grad_half_decay[block] = weighted.sum(dim=-1) + weighted.sum(dim=-2)  # (b, h', N)
    return grad_query, grad_key, grad_value, grad_half_decay


@_forward.register_fake
def _(query, key, value, half_decay, distance, scale):
    return torch.empty_like(value)


@_backward.register_fake
def _(grad_output, query, key, value, half_decay, distance, output, scale):
    return tuple(torch.empty_like(x) for x in (query, key, value, half_decay))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _autograd(ctx, grad_output):
    query, key, value, half_decay, distance, output = ctx.saved_tensors
    grad_output = grad_output.to(value.dtype)
    return *_backward(grad_output, query, key, value, half_decay, distance, output, ctx.scale), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _blocks(half_decay, distance):
    """Yield slices of (batch, heads): several samples if their logits fit, otherwise some heads of one sample."""
    batch, heads, _ = half_decay.shape
    size = max(torch.get_num_threads(), SCRATCH_BYTES // (distance.numel() * distance.element_size()))
    samples, heads_at_once = max(1, size // heads), min(size, heads)
    for first_sample in range(0, batch, samples):
        for first_head in range(0, heads, heads_at_once):
            yield slice(first_sample, first_sample + samples), slice(first_head, first_head + heads_at_once)


def _attention(query, key, half_decay, distance, scale):
    logits = (half_decay[..., :, None] + half_decay[..., None, :]).mul_(distance)  # (b, h', N, N)
    if query.dtype == logits.dtype:
        logits.flatten(0, 1).baddbmm_(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale)
    else:
        logits.add_(query @ key.transpose(-1, -2), alpha=scale)
    return torch.softmax(logits, dim=-1, out=logits)


def blockwise_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: Decay, scale: float
) -> torch.Tensor:
    """Compute spatial decay attention block by block, without keeping any logits."""
    half_decay, distance = decay.half_decay_and_distance()
    with torch.autocast(query.device.type, enabled=False):  # the operands already have the dtypes they need
        return _forward(query, key, value, half_decay, distance, scale)
