"""How `SDTAttention` computes: its processor, which chooses among our attention backends and those of diffusers."""

from functools import partial

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,  # no public function returns the backend that `attention_backend(...)` set
    dispatch_attention_fn,
)
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from .attention import check_backend, spatial_decay_attention
from .attention.dispatch import Backend

#: diffusers' backends that add a mask of any values. The others refuse a mask or keep only where it is not zero.
MASK_BACKENDS = ("native", "_native_math", "_native_efficient", "_native_cudnn", "flex", "xformers")


class SDTAttnProcessor:
    """Computes `SDTAttention` through `spatial_decay_attention`.

    The backend is the first of these that is set:

    1. `model.set_attention_backend(name)` of diffusers;
    2. `backend` of this processor, which `set_decay_backend(model, name)` sets;
    3. diffusers' active backend (`with attention_backend(name):`, the environment variable DIFFUSERS_ATTN_BACKEND)
       unless it is diffusers' default, `native`;
    4. the best of our backends for the device.

    A backend of diffusers receives the decay as an additive mask; those outside `MASK_BACKENDS`, such as the flash
    family, are refused. The mask has the query's dtype: in bf16, decays of 16 to 32 are rounded to steps of 1/8. Our
    backends keep fp32.

    Args:
        backend: A name in `sdt_diffusion.attention.BACKENDS`; `None` for no choice.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, backend: str | None = None):
        self.backend: str | Backend | None = check_backend(backend)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        grid_size: tuple[int, int],
        conditioning: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend as `SDTAttention.forward` describes."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # each (B, N, h*d)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        position = None if attn.local_position is None else attn.local_position(value, grid_size)  # (B, N, h*d)
        query, key, value = (
            x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)  # (B, h, N, d)
            for x in (query, key, value)
        )
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb) for x in (query, key))
        gate, alpha = (None, None) if attn.gate is None else attn.gate(hidden_states, conditioning)  # (B, h, N), (h,)
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
        )  # (B, h, N, d)
        hidden_states = hidden_states.transpose(1, 2).flatten(2)  # (B, N, h*d)
        if position is not None:
            hidden_states = hidden_states + position
        return attn.to_out[1](attn.to_out[0](hidden_states))  # (B, N, D)

    def _resolve_backend(self):
        name = self._attention_backend
        if name is None:
            if self.backend is not None:
                return self.backend
            name, _ = _AttentionBackendRegistry.get_active_backend()
            if name == AttentionBackendName.NATIVE:
                return None
        return partial(_diffusers_attention, name, self._parallel_config)


def _diffusers_attention(name, parallel_config, query, key, value, decay, scale):
    mask = None
    if decay is not None:
        if name not in MASK_BACKENDS:
            raise ValueError(
                f"diffusers' attention backend {getattr(name, 'value', name)!r} cannot add the spatial decay to the "
                f"logits: choose one of {', '.join(MASK_BACKENDS)}, or one of ours by set_decay_backend(model, name)."
            )
        mask = decay.bias().to(query.dtype)  # (B, h, N, N)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, N, h, d), diffusers' layout
    output = dispatch_attention_fn(
        query, key, value, attn_mask=mask, scale=scale, backend=name, parallel_config=parallel_config
    )
    return output.transpose(1, 2)  # (B, h, N, d)


def set_decay_backend(model: nn.Module, backend: str | None) -> None:
    """Choose which of our backends computes the spatial decay attention of a whole model.

    This replaces what `model.set_attention_backend` of diffusers may have set on the model.

    Args:
        model: Any module with `SDTAttention` inside: a transformer or a classifier.
        backend: A name in `sdt_diffusion.attention.BACKENDS`; `None` for the default (see `SDTAttnProcessor`).

    Raises:
        ValueError: If the name is unknown (the message lists the known ones) or the model has no such attention.
    """
    check_backend(backend)
    modules = [
        module
        for module in model.modules()
        if isinstance(module, AttentionModuleMixin) and SDTAttnProcessor in module._available_processors
    ]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no spatial decay attention.")
    for module in modules:
        module.set_processor(SDTAttnProcessor(backend))
