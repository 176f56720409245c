"""Inputs of the fused attention's tests, and its results."""

import torch
import torch.nn.functional as F

from sdt_diffusion.attention import Decay


def inputs(grid, batch=2, heads=2, head_dim=16, dtype=torch.float32, gate=None, seed=0):
    """Return query, key and value that are not contiguous, gate and alpha."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    tokens = grid[0] * grid[1]
    shape = (batch, tokens, heads, head_dim)
    tensors = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]
    logits = torch.randn(batch, heads, tokens, generator=generator)
    gates = F.logsigmoid(logits) if gate is None else torch.full_like(logits, gate)
    return [x.requires_grad_() for x in (*tensors, gates, torch.rand(heads, generator=generator) + 0.5)]


def results(attend, tensors, grid, variant="context", dtype=None):
    """Return the output and all gradients, of a loss that weighs every number differently."""
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    *qkv, gate, alpha = tensors
    output = attend(*qkv, Decay(gate, alpha, grid, variant), 1 / qkv[0].shape[-1] ** 0.5)
    weights = torch.sin(torch.arange(output.numel())).view_as(output).to(output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors, allow_unused=True)]


def fused(*args, **options):
    from sdt_diffusion.attention.fused import fused_attention

    return fused_attention(*args, **options)


def pruned(eps):
    """Return the fused attention that skips that share of each softmax."""
    return lambda query, key, value, decay, scale: fused(query, key, value, decay._replace(prune_eps=eps), scale)
