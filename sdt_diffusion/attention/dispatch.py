"""`spatial_decay_attention`, which every model calls to compute attention, and the table of its backends."""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .blockwise import blockwise_attention
from .dense import dense_attention
from .factored import factored_attention
from .flex import flex_decay_attention
from .formula import Decay, check_variant, reference_attention
from .fused import check_support, fused_attention
from .memory_efficient import xformers_attention

#: attend(query, key, value, decay, scale): the tensors as in `spatial_decay_attention`, `None` for no decay.
Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Decay | None, float], torch.Tensor]
#: The same for a backend with a name. Of these, only `reference` is called without a decay.
NamedBackend = Callable[..., torch.Tensor]

#: Backends by name; a new one is a file and a line here. Only `reference` is called for `none` and `raster`.
BACKENDS: dict[str, NamedBackend] = {
    "reference": reference_attention,
    "dense": dense_attention,
    "blockwise": blockwise_attention,
    "triton": fused_attention,
    "factored": factored_attention,
    "flex": flex_decay_attention,
    "xformers": xformers_attention,
}
#: Those that can skip distant tokens, and those that take `decomposed=True` because they need no copies of lines.
PRUNES = ("blockwise", "triton")
DECOMPOSES: tuple[str, ...] = ("triton",)
#: The most that `prune_eps` may be.
MAX_PRUNE_EPS = 0.5
#: Name of a backend to use where no argument and no model names one.
ENVIRONMENT_VARIABLE = "SDT_ATTENTION_BACKEND"


class Choice(NamedTuple):
    """A row of `CHOICES`.

    Args:
        backends: Names, the best first; the first that supports head size and dtype is taken.
        device: Type of the device; `None` for any.
        min_tokens: Fewest tokens.
        training: Whether gradients are needed; `None` for both.
    """

    backends: tuple[str, ...]
    device: str | None = None
    min_tokens: int = 0
    training: bool | None = None


#: What is used where nobody names a backend: the first row that applies. The CPU's was measured (docs/performance.md).
#: The GPU's was never timed; its kernel needs a fraction of the memory.
CHOICES = (
    Choice(("blockwise",), device="cpu"),
    Choice(("triton", "dense"), device="cuda"),
    Choice(("dense",)),
)
#: Up to how many tokens CPUs compute plain attention in fp32.
FEW_TOKENS = 128
#: Those that take their tokens' places from the grid alone, and so take no registers.
WITHOUT_REGISTERS = ("triton",)
#: Those that need all of the grid.
WITHOUT_PLACES = ("blockwise", "triton", "flex")
#: check(query, value), which raises a ValueError, of the backends in `CHOICES` that do not take every head and dtype.
CHECKS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {"triton": check_support}


def named_backend(backend: str | None = None) -> str | None:
    """Return the backend that was asked for: by the argument, else by the environment variable SDT_ATTENTION_BACKEND.

    Raises:
        ValueError: If the name is unknown (the message lists the known ones).
    """
    if backend is not None or torch.compiler.is_exporting():
        return check_backend(backend)
    name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}, not {name!r}.")
    return name


def choose_backend(
    query: torch.Tensor,
    value: torch.Tensor,
    device: str | None = None,
    num_registers: int = 0,
    whole_grid: bool = True,
) -> str:
    """Choose a backend where nobody named one, by `CHOICES`.

    It is `reference` for exports: an exported program (torch.export, ONNX) then consists of torch's own operators and
    runs without this package. And in forward-mode differentiation (`torch.func.jvp`), in which operators of our own
    would give no derivatives, without a word.

    Args:
        query: Shape (batch, heads, tokens, head_dim).
        value: Shape (batch, heads, tokens, value_dim).
        device: Type of the device; that of the query by default.
        num_registers: Tokens that are not on the grid.
        whole_grid: Whether the tokens are all of the grid.
    """
    if torch.compiler.is_exporting() or _in_forward_mode():
        return "reference"
    device, training = device or query.device.type, torch.is_grad_enabled()
    unfit = {*(WITHOUT_REGISTERS if num_registers else ()), *(() if whole_grid else WITHOUT_PLACES)}
    for choice in CHOICES:
        if (
            choice.device in (None, device)
            and choice.min_tokens <= query.shape[-2]
            and choice.training in (None, training)
        ):
            for name in choice.backends:
                if name not in unfit and _supports(name, query, value):
                    return name
    return "reference"


def _in_forward_mode():
    return torch.autograd.forward_ad._current_level >= 0  # no public function tells


def _supports(name, query, value):
    if name not in BACKENDS:  # left out of the code that a folder carries
        return False
    try:
        if name in CHECKS:
            CHECKS[name](query, value)
    except ValueError:
        return False
    return True


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
    prune_eps: float = 0.0,
    num_registers: int = 0,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute attention that decays with distance on the patch grid: softmax(Q K^T / sqrt(d) + M) V.

    Args:
        query: Shape (batch, heads, tokens, head_dim), tokens in raster order after `num_registers` others.
        key: Shape (batch, heads, tokens, head_dim).
        value: Shape (batch, heads, tokens, value_dim).
        gate: G <= 0 per token and head, shape (batch, heads, tokens), or (batch or 1, heads, 1) for the same on every
            token; in fp32 or fp64 whatever the dtype of the query. Ignored by `none`.
        alpha: Strength of the decay > 0, shape (heads,). Ignored by `none`.
        grid_size: Rows H and columns W of the patch grid, H * W = tokens - num_registers unless there are `places`.
        variant: One of `SPATIAL_DECAY_VARIANTS`.
        decomposed: Attend along the width inside each row, then along the height inside each column of that result,
            each with its own one-dimensional decay, by the same queries and keys. Costs O(HW(H+W)) instead of
            O((HW)^2).
        scale: Factor of Q K^T; 1 / sqrt(head_dim) by default.
        backend: A name in `BACKENDS`, or a function attend(query, key, value, decay, scale), which then has to handle
            every variant; `choose_backend` chooses by default. By name, `raster` is always computed by `reference`,
            and `none` by `torch.nn.functional.scaled_dot_product_attention` unless the name is `reference`.
            Second derivatives need `reference`, which is chosen by default in forward-mode differentiation.
        prune_eps: Share of each query's softmax that a backend may skip, as `pruning` describes, 0 to 0.5; only
            `blockwise` and `triton` do. Rows and columns of decomposed attention are never pruned.
        num_registers: How many of the first tokens are not on the grid. Nothing decays to or from them: M is 0 there.
            `triton` takes none, nor do `decomposed` and `prune_eps`.
        places: Where on the grid the tokens after the registers are, in raster order, shape (tokens - num_registers,),
            if they are only some of it. Neither `raster`, `decomposed` and `prune_eps` nor the backends in
            `WITHOUT_PLACES` take them.

    Returns:
        Tensor of shape (batch, heads, tokens, value_dim), in the value's dtype or autocast's.

    Raises:
        ValueError: If the variant or backend is unknown, shapes or the grid do not fit each other, a gate is missing
            or of a wrong shape, or a backend that was named cannot compute this; a default one falls back to another.
    """
    check_variant(variant)
    height, width = grid_size
    tokens = num_registers + (height * width if places is None else len(places))
    if query.shape[-2] != tokens or key.shape[-2] != tokens:
        registers = f" after {num_registers} registers" if num_registers else ""
        source = f"grid_size {height}x{width} means" if places is None else "places name"
        raise ValueError(
            f"{source} {tokens - num_registers} tokens{registers}, but query and key have "
            f"{query.shape[-2]} and {key.shape[-2]}."
        )
    if places is not None and (variant == "raster" or decomposed or prune_eps):
        raise ValueError(
            f"places leave out tokens, which variant={variant!r}, decomposed={decomposed} or prune_eps={prune_eps} "
            "needs: choose another variant than 'raster', and turn the others off."
        )
    if num_registers and (decomposed or prune_eps):
        raise ValueError(
            f"num_registers {num_registers}: registers have no place on the grid, which decomposed={decomposed} and "
            f"prune_eps={prune_eps} need: turn them off, or use no registers."
        )
    if key.shape != query.shape or value.shape[:3] != query.shape[:3] or 0 in query.shape[1:]:
        raise ValueError(
            f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}: they "
            "must have the same samples, heads and tokens, at least one of each, and query and key the same columns."
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # normalized queries are fp32 under autocast
    if not callable(backend):
        backend = named_backend(backend)
        check_pruning(prune_eps, backend)
        if backend in PRUNES and _in_forward_mode():
            raise ValueError(f"The backend {backend!r} has no forward-mode derivatives: use 'reference'.")
        if num_registers and backend in WITHOUT_REGISTERS and variant not in ("none", "raster"):
            raise ValueError(f"The backend {backend!r} takes no num_registers, here {num_registers}: use 'dense'.")
        if places is not None and backend in WITHOUT_PLACES and variant != "none":
            raise ValueError(f"The backend {backend!r} takes no places, only all of the grid: use 'dense'.")
        backend = backend or choose_backend(query, value, num_registers=num_registers, whole_grid=places is None)
    attend = _resolve_backend(backend, variant)
    decay = None
    if variant != "none":
        decay = Decay(*_check_gate(gate, alpha, query), grid_size, variant, 0.0 if decomposed else prune_eps)
        decay = decay._replace(num_registers=num_registers, places=places)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if not decomposed:
        return attend(query, key, value, decay, scale)  # (B, h, N, d)
    if backend in DECOMPOSES and attend is BACKENDS[backend]:
        return attend(query, key, value, decay, scale, decomposed=True)

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
    """Compute plain attention by torch's fused kernels, which is all that `none` needs.

    Few tokens in half precision are computed in fp32 on CPUs, where torch's backward pass in bf16 takes up to 9 times
    as long.
    """
    if query.device.type != "cpu" or query.dtype.itemsize > 2 or query.shape[-2] > FEW_TOKENS:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    with torch.autocast("cpu", enabled=False):
        output = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=scale)
    return output.to(value.dtype)


def check_backend(backend: str | None) -> str | None:
    """Return `backend` if it is `None` or a name in `BACKENDS`.

    Raises:
        ValueError: If it is not; the message lists the known ones.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"Unknown attention backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    return backend


def check_pruning(prune_eps: float, backend: str | None) -> None:
    """Refuse a share to skip that is out of its range, or a backend that was named and cannot skip.

    Raises:
        ValueError: Says why.
    """
    if not 0 <= prune_eps <= MAX_PRUNE_EPS:  # written so that NaN is refused too
        raise ValueError(f"prune_eps must be from 0 to {MAX_PRUNE_EPS}, not {prune_eps}.")
    if prune_eps and backend is not None and backend not in PRUNES:
        raise ValueError(
            f"The backend {backend!r} skips no tokens: choose one of {', '.join(PRUNES)}, or set prune_eps to 0."
        )


def _resolve_backend(backend, variant):
    if callable(backend):
        return backend
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
    dtype = torch.promote_types(torch.promote_types(gate.dtype, query.dtype), torch.float32)
    return gate.to(dtype).expand(batch, heads, tokens), alpha


# (batch, heads, H*W, ...) <-> (batch*H, heads, W, ...) and (batch*W, heads, H, ...)


def _rows(x, grid_size):
    return x.unflatten(2, grid_size).transpose(1, 2).flatten(0, 1)


def _columns(x, grid_size):
    return x.unflatten(2, grid_size).movedim(3, 1).flatten(0, 1)


def _from_rows(x, grid_size):
    return x.unflatten(0, (-1, grid_size[0])).transpose(1, 2).flatten(2, 3)


def _from_columns(x, grid_size):
    return x.unflatten(0, (-1, grid_size[1])).movedim(1, 3).flatten(2, 3)
