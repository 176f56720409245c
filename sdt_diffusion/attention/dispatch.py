"""`spatial_decay_attention`, which every model calls to compute attention, and the table of its backends."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .blockwise import blockwise_attention
from .dense import dense_attention
from .formula import Decay, check_variant, reference_attention
from .fused import fused_attention

#: attend(query, key, value, decay, scale): the tensors as in `spatial_decay_attention`, `None` for no decay.
Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Decay | None, float], torch.Tensor]
#: The same for a backend with a name. Of these, only `reference` is called without a decay.
NamedBackend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Decay, float], torch.Tensor]

#: Backends by name; a new one is a file and a line here. Only `reference` is called for `none` and `raster`.
BACKENDS: dict[str, NamedBackend] = {
    "reference": reference_attention,
    "dense": dense_attention,
    "blockwise": blockwise_attention,
    "triton": fused_attention,
}


def default_backend(query: torch.Tensor) -> str:
    """Choose `blockwise` on a CPU, `dense` on accelerators, `reference` for exports.

    An exported program (torch.export, ONNX) then consists of torch's own operators and runs without this package.
    """
    if torch.compiler.is_exporting():
        return "reference"
    return "blockwise" if query.device.type == "cpu" else "dense"


def spatial_decay_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    alpha: torch.Tensor | None,
    grid_size: tuple[int, int],
    *,
    variant: str = "context",
    decomposed: bool = False,
    scale: float | None = None,
    backend: str | Backend | None = None,
) -> torch.Tensor:
    """Compute attention that decays with distance on the patch grid: softmax(Q K^T / sqrt(d) + M) V.

    Args:
        query: Shape (batch, heads, tokens, head_dim), tokens in raster order.
        key: Shape (batch, heads, tokens, head_dim).
        value: Shape (batch, heads, tokens, value_dim).
        gate: G <= 0 per token and head, shape (batch, heads, tokens), or (batch or 1, heads, 1) for the same on every
            token; in fp32 or fp64 whatever the dtype of the query. Ignored by `none`.
        alpha: Strength of the decay > 0, shape (heads,). Ignored by `none`.
        grid_size: Rows H and columns W of the patch grid, H * W = tokens.
        variant: One of `SPATIAL_DECAY_VARIANTS`.
        decomposed: Attend along the width inside each row, then along the height inside each column of that result,
            each with its own one-dimensional decay, by the same queries and keys. Costs O(HW(H+W)) instead of
            O((HW)^2).
        scale: Factor of Q K^T; 1 / sqrt(head_dim) by default.
        backend: A name in `BACKENDS`, or a function attend(query, key, value, decay, scale), which then has to handle
            every variant; `default_backend` chooses by default. By name, `raster` is always computed by `reference`,
            and `none` by `torch.nn.functional.scaled_dot_product_attention` unless the name is `reference`.
            `torch.func` and second derivatives need `reference`.

    Returns:
        Tensor of shape (batch, heads, tokens, value_dim), in the value's dtype or autocast's.

    Raises:
        ValueError: If the variant or backend is unknown, the grid does not match the tokens, or a gate is missing or
            of a wrong shape.
    """
    check_variant(variant)
    height, width = grid_size
    if query.shape[-2] != height * width or key.shape[-2] != height * width:
        raise ValueError(
            f"grid_size {height}x{width} means {height * width} tokens, but query and key have "
            f"{query.shape[-2]} and {key.shape[-2]}."
        )
    decay = None if variant == "none" else Decay(*_check_gate(gate, alpha, query), grid_size, variant)
    attend = _resolve_backend(default_backend(query) if backend is None else backend, variant)
    query, key = query.to(value.dtype), key.to(value.dtype)  # normalized queries are fp32 under autocast
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if not decomposed:
        return attend(query, key, value, decay, scale)  # (B, h, N, d)

    # A row is a 1 x W grid and a column an H x 1 grid: the same formula serves both passes.
    along_rows = along_columns = None
    if decay is not None:
        along_rows = decay._replace(gate=_rows(decay.gate, grid_size), grid_size=(1, width))
        along_columns = decay._replace(gate=_columns(decay.gate, grid_size), grid_size=(height, 1))
    value = attend(*(_rows(x, grid_size) for x in (query, key, value)), along_rows, scale)  # (B*H, h, W, d)
    value = _from_rows(value, grid_size)  # (B, h, N, d)
    output = attend(*(_columns(x, grid_size) for x in (query, key, value)), along_columns, scale)  # (B*W, h, H, d)
    return _from_columns(output, grid_size)  # (B, h, N, d)


def sdpa_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: None, scale: float
) -> torch.Tensor:
    """Compute plain attention by torch's fused kernels, which is all that `none` needs."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def check_backend(backend: str | None) -> str | None:
    """Return `backend` if it is `None` or a name in `BACKENDS`.

    Raises:
        ValueError: If it is not; the message lists the known ones.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"Unknown attention backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    return backend


def _resolve_backend(backend, variant):
    if callable(backend):
        return backend
    check_backend(backend)
    attend = BACKENDS[backend]
    if variant == "raster":  # not a product with a distance, which all other backends rely on
        return reference_attention
    return sdpa_attention if variant == "none" and attend is not reference_attention else attend


def _check_gate(
    gate: torch.Tensor | None, alpha: torch.Tensor | None, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, _ = query.shape
    if gate is None or alpha is None:
        raise ValueError("A spatial decay other than 'none' needs `gate` and `alpha`.")
    if gate.ndim != 3 or gate.shape[0] not in (1, batch) or gate.shape[1] != heads or gate.shape[2] not in (1, tokens):
        raise ValueError(f"`gate` has shape {tuple(gate.shape)}; ({batch}, {heads}, {tokens}) is needed.")
    if alpha.shape != (heads,):
        raise ValueError(f"`alpha` has shape {tuple(alpha.shape)}; ({heads},) is needed.")
    # Keep at least fp32: bf16 would round decays of 16 to 32 to steps of 1/8.
    return gate.to(torch.promote_types(gate.dtype, torch.float32)).expand(batch, heads, tokens), alpha


# (batch, heads, H*W, ...) <-> (batch*H, heads, W, ...) and (batch*W, heads, H, ...)


def _rows(x, grid_size):
    return x.unflatten(2, grid_size).transpose(1, 2).flatten(0, 1)


def _columns(x, grid_size):
    return x.unflatten(2, grid_size).movedim(3, 1).flatten(0, 1)


def _from_rows(x, grid_size):
    return x.unflatten(0, (-1, grid_size[0])).transpose(1, 2).flatten(2, 3)


def _from_columns(x, grid_size):
    return x.unflatten(0, (-1, grid_size[1])).movedim(1, 3).flatten(2, 3)
