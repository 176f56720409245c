"""Convert checkpoints of hustvl/LightningDiT: SiT with rotary embeddings, SwiGLU, RMSNorm and QK-norm by choice."""

from collections.abc import Mapping
from typing import Any

import torch

from . import Source, check_names, shape_of
from .facebook_dit import check_shapes, depth_of, dit_names, read_network
from .sit import flow_source

#: How its published samples move its times t, 0 at noise, towards noise: 0.3 t / (1 - 0.7 t).
TIMESTEP_SHIFT = 0.3
ROTARY_TABLES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")


def is_lightning_dit(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a checkpoint has a part that DiT and SiT do not have."""
    parts = ("blocks.0.norm1.weight", "blocks.0.mlp.w12.weight", "blocks.0.attn.q_norm.weight", *ROTARY_TABLES)
    return any(name in state_dict for name in parts)


def read_lightning_dit(state_dict: Mapping[str, torch.Tensor], num_attention_heads: int | None = None) -> Source:
    """Read a checkpoint of LightningDiT; see `read_network`.

    What it has besides DiT becomes config keys. Two parts are weights here: the factors of its RMSNorms, which adaLN's
    scales hold as well, and an adaLN without shifts, which is one whose shifts are zero.
    """
    depth, blocks = depth_of(state_dict), range(depth_of(state_dict))
    has_norms, has_swiglu = "blocks.0.norm1.weight" in state_dict, "blocks.0.mlp.w12.weight" in state_dict
    has_qk_norm, has_rotary = "blocks.0.attn.q_norm.weight" in state_dict, ROTARY_TABLES[0] in state_dict

    expected = {*dit_names(depth), "pos_embed"}
    if has_swiglu:
        expected = {name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.") for name in expected}
    norms = {f"blocks.{i}.norm{k}.weight" for i in blocks for k in (1, 2)} | {"final_layer.norm_final.weight"}
    qk_norms = {f"blocks.{i}.attn.{k}_norm.weight" for i in blocks for k in "qk"}
    expected |= (norms if has_norms else set()) | (qk_norms if has_qk_norm else set())
    check_names(state_dict, expected | (set(ROTARY_TABLES) if has_rotary else set()), "LightningDiT")
    check_shapes(state_dict)

    tensors = {name: tensor.float() for name, tensor in state_dict.items()}
    extra: dict[str, Any] = {}
    if has_rotary:
        extra["rotary"] = True
    if has_qk_norm:
        extra["qk_norm"] = "rms_norm"
        num_attention_heads = _heads(tensors, "blocks.0.attn.q_norm.weight", 1, num_attention_heads)
    if has_rotary:
        num_attention_heads = _heads(tensors, ROTARY_TABLES[0], 2, num_attention_heads)
    if has_swiglu:
        extra["activation_fn"] = "swiglu"
        for i in blocks:
            for kind in ("weight", "bias"):
                # silu(first half) * second half there, first half * silu(second half) in diffusers
                gate, value = tensors.pop(f"blocks.{i}.mlp.w12.{kind}").tensor_split(2)
                tensors[f"blocks.{i}.mlp.fc1.{kind}"] = torch.cat([value, gate])
                tensors[f"blocks.{i}.mlp.fc2.{kind}"] = tensors.pop(f"blocks.{i}.mlp.w3.{kind}")
    width = shape_of(tensors, "x_embedder.proj.weight", 4)[0]
    for i in blocks:
        _add_shifts(tensors, f"blocks.{i}.adaLN_modulation.1", width)
    if has_norms:
        extra["norm_type"] = "rms"
        for i in blocks:
            for norm, scale in (("norm1", 1), ("norm2", 4)):
                _fold(tensors, f"blocks.{i}.{norm}.weight", f"blocks.{i}.adaLN_modulation.1", scale, width)
        _fold(tensors, "final_layer.norm_final.weight", "final_layer.adaLN_modulation.1", 1, width)

    config, weights = read_network(tensors, num_attention_heads)
    if has_rotary:
        _check_rotary(tensors, config)
    for name in qk_norms if has_qk_norm else ():
        weights["transformer_" + name.replace("q_norm", "norm_q").replace("k_norm", "norm_k")] = tensors[name]
    return flow_source("LightningDiT", {**config, **extra}, weights, 1 / TIMESTEP_SHIFT)


def _heads(tensors, name, ndim, given):
    """Return the number of heads that a tensor with the width of a head tells."""
    width, head_dim = shape_of(tensors, "x_embedder.proj.weight", 4)[0], shape_of(tensors, name, ndim)[-1]
    if width % head_dim or given not in (None, width // head_dim):
        heads = "the" if given is None else f"num_attention_heads {given} of the"
        raise ValueError(f"{name} has {head_dim} channels, which do not fit {heads} width {width}.")
    return width // head_dim


def _add_shifts(tensors, module, width):
    """Turn (scale, gate, scale, gate) of a block without shifts into DiT's six parts."""
    for kind in ("weight", "bias"):
        tensor = tensors[f"{module}.{kind}"]
        if len(tensor) == 4 * width:
            none = torch.zeros_like(tensor[:width])
            scale_msa, gate_msa, scale_mlp, gate_mlp = tensor.chunk(4)
            tensors[f"{module}.{kind}"] = torch.cat([none, scale_msa, gate_msa, none, scale_mlp, gate_mlp])


def _fold(tensors, norm, module, index, width):
    """Move the factors w of a norm into the scale s that follows: w x (1 + s) = x (1 + s'), s' = w - 1 + w s."""
    factor = tensors.pop(norm)
    if factor.shape != (width,):
        raise ValueError(f"{norm} has the shape {tuple(factor.shape)}, not {(width,)}.")
    for kind in ("weight", "bias"):
        parts = list(tensors[f"{module}.{kind}"].split(width))
        if len(parts) <= index or len(parts[index]) != width:
            raise ValueError(f"{module}.{kind} has too few rows for the width {width}.")
        scale = parts[index]
        parts[index] = factor[:, None] * scale if kind == "weight" else factor - 1 + factor * scale
        tensors[f"{module}.{kind}"] = torch.cat(parts)


def _check_rotary(tensors, config):
    """Compare the tables with those of `rotary`: pairs of neighbors, rows in half of a head, then columns."""
    side, pairs = config["sample_size"] // config["patch_size"], config["attention_head_dim"] // 4
    position = torch.arange(side, dtype=torch.float64)
    angle = position[:, None] * 10_000 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)  # (S, d/4)
    angle = angle.repeat_interleave(2, dim=1)  # (S, d/2)
    angles = torch.cat([angle.repeat_interleave(side, dim=0), angle.repeat(side, 1)], dim=1)  # (N, d)
    for name, table in zip(ROTARY_TABLES, (angles.cos(), angles.sin()), strict=True):
        if tensors[name].shape != table.shape or not torch.allclose(tensors[name].double(), table, rtol=0, atol=1e-2):
            raise ValueError(f"{name} is not the table of a {side}x{side} grid with theta 10000.")
