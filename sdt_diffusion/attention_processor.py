"""How `SDTAttention` computes: its processor, which chooses among our attention backends and those of diffusers."""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,  # no public function returns the backend that `attention_backend(...)` set
    dispatch_attention_fn,
)
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from .attention import BACKENDS, check_backend, spatial_decay_attention
from .attention.dispatch import MAX_PRUNE_EPS, PRUNES, Backend, check_pruning, choose_backend, named_backend
from .attention.factored import add_decay_columns
from .attention.memory_efficient import load_xformers
from .utils.ranges import Range, check_value

#: diffusers' backends that add a mask of any values.
MASK_BACKENDS = ("native", "_native_math", "_native_efficient", "_native_cudnn", "flex", "xformers")
#: Those that take no mask but sum products in fp32, and so can compute the decay from further columns of query and
#: key, with the columns of the widest head that they take. The others round columns to 8 bits, or are not known here.
FACTORED_BACKENDS = {
    "flash": 256,
    "flash_hub": 256,
    "flash_varlen": 256,
    "flash_varlen_hub": 256,
    "flash_4_hub": 128,
    "_flash_3": 256,
    "_flash_3_hub": 256,
    "_flash_varlen_3": 256,
    "_flash_3_varlen_hub": 256,
    "aiter_fa2_hub": 256,
    "_native_flash": 256,
}


class SDTAttnProcessor:
    """Computes `SDTAttention` through `spatial_decay_attention`.

    The backend is the first of these that is set:

    1. what was chosen for the model: by `model.set_attention_backend(name)`, for our names and those of diffusers, by
       `set_decay_backend(model, name)`, or by `model.enable_xformers_memory_efficient_attention()`;
    2. diffusers' active backend (`with attention_backend(name):`, the environment variable DIFFUSERS_ATTN_BACKEND)
       unless it is diffusers' default, `native`;
    3. the environment variable SDT_ATTENTION_BACKEND, with one of our names;
    4. the best of our backends for the device, by `attention.dispatch.CHOICES`.

    Backends of diffusers in `MASK_BACKENDS` receive the decay as a mask in the query's dtype: in bf16, decays of 16 to
    32 are rounded to steps of 1/8. Those in `FACTORED_BACKENDS` receive it as further columns of query and key, as
    `attention.factored` describes. The others are refused.

    Args:
        backend: A name in `sdt_diffusion.attention.BACKENDS`; `None` for no choice.
        prune_eps: See `spatial_decay_attention`.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, backend: str | None = None, prune_eps: float = 0.0):
        self.backend: str | Backend | None = check_backend(backend)
        check_value("prune_eps", prune_eps, (float,), Range(0, MAX_PRUNE_EPS))
        check_pruning(prune_eps, backend)
        self.prune_eps = prune_eps

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        grid_size: tuple[int, int],
        conditioning: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        decay_scale: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend as `SDTAttention.forward` describes."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # each (B, N, h*d)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        position, registers = None, attn.num_registers
        if attn.local_position is not None:
            position = attn.local_position(value[:, registers:], grid_size)  # (B, N, h*d)
            position = F.pad(position, (0, 0, registers, 0)) if registers else position
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))  # (B, N, h, d)
        if attn.norm_q is not None and attn.norm_k is not None:
            dtype = attn.norm_q.weight.dtype  # under autocast fp32, which is rounded once, after the rotation
            query, key = attn.norm_q(query.to(dtype)), attn.norm_k(key.to(dtype))
        if image_rotary_emb is not None:
            query, key = (_rotate(x, *image_rotary_emb) for x in (query, key))
        query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))  # (B, h, N, d)
        gate, alpha = (None, None) if attn.gate is None else attn.gate(hidden_states, conditioning)  # (B, h, N), (h,)
        if decay_scale is not None and gate is not None:
            gate = gate * decay_scale[..., None]  # the decay is linear in the gate
        hidden_states = spatial_decay_attention(
            query,
            key,
            value,
            gate,
            alpha,
            grid_size,
            variant=attn.spatial_decay,
            decomposed=attn.decomposed,
            backend=self._resolve_backend(),
            prune_eps=self.prune_eps,
            num_registers=registers,
            places=places,
        )  # (B, h, N, d)
        hidden_states = hidden_states.transpose(1, 2).flatten(2)  # (B, N, h*d)
        if position is not None:
            hidden_states = hidden_states + position
        return attn.to_out[1](attn.to_out[0](hidden_states))  # (B, N, D)

    def diffusers_backend(self) -> str | None:
        """Return the backend of diffusers that is used, `None` for one of ours."""
        name = self._attention_backend
        if name is None and self.backend is None:
            name, _ = _AttentionBackendRegistry.get_active_backend()
            name = None if name == AttentionBackendName.NATIVE else name
        return getattr(name, "value", name)

    def _resolve_backend(self):
        name = self.diffusers_backend()
        return self.backend if name is None else partial(_diffusers_attention, name, self._parallel_config)


def _rotate(x, cosines, sines):
    """Turn pairs of channels of queries or keys (B, N, h, d) by the angles of a rotary embedding."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # compilers and ONNX know no complex numbers
        return apply_rotary_emb(x, (cosines, sines), sequence_dim=1)
    turns = torch.complex(cosines[None, :, ::2], sines[None, :, ::2])  # (1, N, d/2), on CPUs in a third of the time
    return apply_rotary_emb(x, turns, use_real=False)


def _diffusers_attention(name, parallel_config, query, key, value, decay, scale):
    mask, value_dim = None, value.shape[-1]
    if decay is not None:
        if decay.prune_eps:
            raise ValueError(f"diffusers' attention backend {name!r} skips no tokens: set prune_eps to 0.")
        if name in MASK_BACKENDS:
            mask = decay.bias().to(query.dtype)  # (B, h, N, N)
        elif name in FACTORED_BACKENDS:
            try:
                query, key, value = add_decay_columns(query, key, value, decay, scale, FACTORED_BACKENDS[name])
            except ValueError as error:
                raise ValueError(f"diffusers' attention backend {name!r} takes no mask. {error}") from error
        else:
            raise ValueError(
                f"diffusers' attention backend {name!r} cannot add the spatial decay to the logits: choose one of "
                f"{', '.join([*MASK_BACKENDS, *FACTORED_BACKENDS])}, or one of ours by set_decay_backend(model, name)."
            )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, N, h, d), diffusers' layout
    output = dispatch_attention_fn(
        query, key, value, attn_mask=mask, scale=scale, backend=name, parallel_config=parallel_config
    )
    return output[..., :value_dim].transpose(1, 2)  # (B, h, N, d)


class AttentionBackendMixin:
    """Lets the methods by which diffusers' models choose a backend take ours too; to be inherited from before them."""

    def set_attention_backend(self, backend: str) -> None:
        """Choose the backend by a name of ours, or else of diffusers.

        Raises:
            ValueError: If the name is unknown (the message lists the known ones).
        """
        theirs = [name.value for name in AttentionBackendName]
        if backend in BACKENDS:
            set_decay_backend(self, backend)
        elif str(backend).lower() not in theirs:  # diffusers takes capitals too
            raise ValueError(
                f"Unknown attention backend {backend!r}: choose one of {', '.join(BACKENDS)}, or of diffusers' "
                f"{', '.join(theirs)}."
            )
        else:
            super().set_attention_backend(backend)  # type: ignore[misc]  # of the class that follows

    def reset_attention_backend(self) -> None:
        """Choose no backend, neither of ours nor of diffusers."""
        set_decay_backend(self, None)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: object = None) -> None:
        """Choose our backend `xformers` if `valid`, else none; called by `enable_xformers_memory_efficient_attention`.

        Raises:
            ValueError: If xformers does not run here, says why; or if an operator of it is chosen.
        """
        if attention_op is not None:
            raise ValueError(f"attention_op must be None, so that xformers chooses its operator, not {attention_op}.")
        if valid:
            load_xformers(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float16)
        set_decay_backend(self, "xformers" if valid else None)


def set_decay_backend(model: nn.Module, backend: str | None, prune_eps: float = 0.0) -> None:
    """Choose which of our backends computes the spatial decay attention of a whole model.

    This replaces what `model.set_attention_backend` may have set on the model.

    Args:
        model: Any module with `SDTAttention` inside: a transformer or a classifier.
        backend: A name in `sdt_diffusion.attention.BACKENDS`; `None` for the default (see `SDTAttnProcessor`).
        prune_eps: See `spatial_decay_attention`.

    Raises:
        ValueError: If the name is unknown (the message lists the known ones), the backend cannot prune, or the model
            has no such attention.
    """
    check_backend(backend)
    modules = _attention_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no spatial decay attention.")
    for module in modules:
        module.set_processor(SDTAttnProcessor(backend, prune_eps))


def describe_backend(model: nn.Module, device: torch.device, dtype: torch.dtype, tokens: int = 256) -> str:
    """Return what computes the attention of a model now, for logs: a name in `BACKENDS` or what says more.

    Args:
        model: Any module with `SDTAttention` inside.
        device: Where it runs.
        dtype: Type of its queries, autocast's under autocast.
        tokens: Patches of an image.

    Returns:
        The name, several if parts of the model differ, or nothing if it has no such attention.
    """
    return ", ".join(dict.fromkeys(_describe(attn, device, dtype, tokens) for attn in _attention_modules(model)))


def named_backends(model: nn.Module) -> set[str]:
    """Return the names of the backends that were asked for, of ours and of diffusers; none where there is a default.

    Args:
        model: Any module with `SDTAttention` inside.
    """
    processors = [attn.processor for attn in _attention_modules(model)]
    ours = [processor for processor in processors if isinstance(processor, SDTAttnProcessor)]
    names = {processor.diffusers_backend() or processor.backend or named_backend() for processor in ours}
    return {name if isinstance(name, str) else "a function" for name in names if name is not None}


def _describe(attn, device, dtype, tokens):
    processor = attn.processor
    if not isinstance(processor, SDTAttnProcessor):
        return type(processor).__name__
    if (name := processor.diffusers_backend()) is not None:
        factored = attn.spatial_decay != "none" and name in FACTORED_BACKENDS
        return f"diffusers' {name} of factors" if factored else f"diffusers' {name}"
    if callable(processor.backend):
        return "a function"
    query = torch.empty(1, attn.heads, tokens, attn.head_dim, dtype=dtype, device="meta")
    name = named_backend(processor.backend) or choose_backend(
        query, query, torch.device(device).type, attn.num_registers
    )
    if attn.spatial_decay == "raster":
        return "reference"
    if attn.spatial_decay == "none":
        return name if name == "reference" else "scaled_dot_product_attention"
    prunes = processor.prune_eps and name in PRUNES and not attn.decomposed
    return f"{name} pruned to {processor.prune_eps:g}" if prunes else name


def _attention_modules(model):
    return [
        module
        for module in model.modules()
        if isinstance(module, AttentionModuleMixin) and SDTAttnProcessor in module._available_processors
    ]
