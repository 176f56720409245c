"""The norms of tokens that blocks are built with."""

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
    kind = nn.RMSNorm if norm_type == "rms" else nn.LayerNorm
    return kind(dim, eps=eps, elementwise_affine=affine)
