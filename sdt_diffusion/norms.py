"""The norms of tokens, queries and keys that blocks are built with."""

import torch
from torch import nn

#: Values of the config key `norm_type`.
NORM_TYPES = {"layer": "LayerNorm (DiT)", "rms": "RMSNorm, which subtracts no mean (LightningDiT)"}


def build_norm(norm_type: str, dim: int, eps: float, affine: bool) -> nn.Module:
    """Build a norm of tokens (..., dim).

    Args:
        norm_type: One of `NORM_TYPES`.
        dim: Width of the tokens.
        eps: Epsilon of the norm.
        affine: Whether it has learned parameters. Norms that adaLN modulates have none: it scales and shifts itself.

    Raises:
        ValueError: If the type is unknown; the message lists the known ones.
    """
    if not isinstance(norm_type, str) or norm_type not in NORM_TYPES:
        raise ValueError(f"Unknown norm_type {norm_type!r}: choose one of {', '.join(NORM_TYPES)}.")
    kind = RMSNorm if norm_type == "rms" else nn.LayerNorm
    return kind(dim, eps=eps, elementwise_affine=affine)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, whose training step takes half the time on CPUs, where torch has no kernel of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute weight x / sqrt(mean(x^2) + eps) over the last dimension; same shape and type."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(dtype).eps if self.eps is None else self.eps
        normalized, _ = _Normalize.apply(x.to(dtype), eps)
        return (normalized if self.weight is None else normalized * self.weight).to(x.dtype)


class _Normalize(torch.autograd.Function):
    """Maps x to y = r x and r = 1 / sqrt(mean(x^2) + eps).

    With dy and dr as their gradients, that of x is r (dy - y (mean(y dy) + r dr / D)), D the width. Saving r as an
    output makes second derivatives right as well.
    """

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x, eps):
        reciprocal = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * reciprocal, reciprocal

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx, grad_y, grad_reciprocal):
        y, reciprocal = ctx.saved_tensors
        mean = (y * grad_y).mean(-1, keepdim=True) + reciprocal * grad_reciprocal / y.shape[-1]
        return torch.addcmul(grad_y, y, mean, value=-1) * reciprocal, None

    @staticmethod
    def jvp(ctx, tangent, _):
        y, reciprocal = ctx.saved_tensors
        mean = (y * tangent).mean(-1, keepdim=True)
        return torch.addcmul(tangent, y, mean, value=-1) * reciprocal, -mean * reciprocal.square()
