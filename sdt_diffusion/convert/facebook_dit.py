"""Convert checkpoints of facebookresearch/DiT, whose names SiT and LightningDiT share, and write them."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..sdt import SDTTransformer2DModel
from ..sdt.embeddings import position_embedding
from . import Source, check_names, ddpm_scheduler, shape_of

#: Keys under which training checkpoints keep state dicts; the averaged weights are the model that was published.
CHECKPOINT_KEYS = ("ema", "model", "state_dict")
#: Modules in DiT's names -> in ours. Queries, keys and values are one module there.
MODULES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_class_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_class_embed.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "time_class_embed.class_embedder",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK_MODULES = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.qkv": "attn.to_qkv",
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
#: Width -> heads of the published sizes of DiT, SiT and LightningDiT.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}


def dit_names(depth: int) -> dict[str, str]:
    """Return the tensors of a DiT with `depth` blocks: names there -> names here."""
    modules = dict(MODULES)
    for i in range(depth):
        modules |= {f"blocks.{i}.{a}": f"transformer_blocks.{i}.{b}" for a, b in BLOCK_MODULES.items()}
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}
    del names["y_embedder.embedding_table.bias"]
    return names


def depth_of(state_dict: Mapping[str, torch.Tensor]) -> int:
    """Return the number of blocks, each of which has tensors named `blocks.{i}.`."""
    return len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")})


def check_shapes(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors of DiT, SiT or LightningDiT that do not fit the others.

    Args:
        state_dict: Tensors in the names of their repository, which have been checked.

    Raises:
        ValueError: Names the tensor, its shape, and the one that fits.
    """
    width, channels, patch_size, _ = shape_of(state_dict, "x_embedder.proj.weight", 4)
    frequencies = shape_of(state_dict, "t_embedder.mlp.0.weight", 2)[1]
    rows = shape_of(state_dict, "y_embedder.embedding_table.weight", 2)[0]
    outputs = shape_of(state_dict, "final_layer.linear.weight", 2)[0]
    gated = "blocks.0.mlp.w3.weight" in state_dict
    hidden = shape_of(state_dict, f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight", 2)[1]
    parts = 4 if len(state_dict["blocks.0.adaLN_modulation.1.weight"]) == 4 * width else 6  # LightningDiT's may have 4
    norms = [tuple(x.shape) for name, x in state_dict.items() if name.endswith(("q_norm.weight", "k_norm.weight"))]
    head = max(norms, key=norms.count, default=())
    if rows < 2:
        raise ValueError(f"y_embedder.embedding_table.weight has {rows} rows, too few for a class and the null class.")
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, channels, patch_size, patch_size),
        "t_embedder.mlp.0": (width, frequencies),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.embedding_table": (rows, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (outputs, width),
        "final_layer.norm_final": (width,),
    }
    block_shapes: dict[str, tuple[int, ...]] = {
        "adaLN_modulation.1": (parts * width, width),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "attn.q_norm": head,
        "attn.k_norm": head,
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
        "mlp.w12": (2 * hidden, width),
        "mlp.w3": (width, hidden),
        "norm1": (width,),
        "norm2": (width,),
    }
    for i in range(depth_of(state_dict)):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block_shapes.items()}
    for module, shape in shapes.items():
        for name, wanted in ((f"{module}.weight", shape), (f"{module}.bias", shape[:1])):
            if name in state_dict and tuple(state_dict[name].shape) != wanted:
                raise ValueError(f"{name} has the shape {tuple(state_dict[name].shape)}, and {wanted} fits the rest.")


def read_network(
    state_dict: Mapping[str, torch.Tensor], num_attention_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a network of DiT's layout.

    Args:
        state_dict: Tensors in DiT's names, of an architecture whose names have been checked.
        num_attention_heads: Heads, which no tensor tells; by default those of the published model of that width.

    Returns:
        The config of an `SDTTransformer2DModel` and its weights in fp32, without gates.

    Raises:
        ValueError: If shapes do not fit each other, or the position embedding is not DiT's.
    """
    width, channels, patch_size, _ = shape_of(state_dict, "x_embedder.proj.weight", 4)
    tokens = shape_of(state_dict, "pos_embed", 3)[1]
    rows = shape_of(state_dict, "y_embedder.embedding_table.weight", 2)[0]
    hidden = shape_of(state_dict, "blocks.0.mlp.fc2.weight", 2)[1]
    outputs = shape_of(state_dict, "final_layer.linear.weight", 2)[0]
    frequencies = shape_of(state_dict, "t_embedder.mlp.0.weight", 2)[1]
    heads = HEADS.get(width) if num_attention_heads is None else num_attention_heads
    if heads is None:
        raise ValueError(f"The weights do not tell the number of heads of width {width}: give num_attention_heads.")
    if width % heads:
        raise ValueError(f"num_attention_heads {heads} does not divide the width {width}.")
    if frequencies % 2:
        raise ValueError(f"t_embedder.mlp.0.weight has {frequencies} inputs, which are not pairs of cosine and sine.")
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"pos_embed has {tokens} tokens, which are no square.")
    if outputs not in (patch_size**2 * channels, 2 * patch_size**2 * channels):
        raise ValueError(f"final_layer.linear has {outputs} outputs, which do not fit {channels} channels.")
    embedding = position_embedding(width, (side, side), (side, side), device="cpu")
    found = state_dict["pos_embed"].float()
    if found.shape != embedding.shape or not torch.allclose(found, embedding, rtol=0, atol=1e-2):
        raise ValueError("pos_embed is not DiT's sine-cosine embedding.")
    depth = depth_of(state_dict)
    config = {
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": outputs // patch_size**2,
        "patch_size": patch_size,
        "sample_size": side * patch_size,
        "num_classes": rows - 1,
        "mlp_ratio": exact_ratio(hidden, width),
        "frequency_embedding_size": frequencies,
    }
    weights = {}
    for name, our_name in dit_names(depth).items():
        tensor = state_dict[name].float()
        if ".attn.qkv." in name:
            for part, rows_of_part in zip("qkv", tensor.tensor_split(3), strict=True):
                weights[our_name.replace("to_qkv", f"to_{part}")] = rows_of_part
        else:
            weights[our_name] = tensor
    return config, weights


def exact_ratio(hidden: int, width: int) -> float:
    """Return the ratio r for which int(width * r) is `hidden`, in spite of rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def read_dit(state_dict: Mapping[str, torch.Tensor], num_attention_heads: int | None = None) -> Source:
    """Read a checkpoint of facebookresearch/DiT; see `read_network`."""
    check_names(state_dict, {*dit_names(depth_of(state_dict)), "pos_embed"}, "DiT")
    check_shapes(state_dict)
    config, weights = read_network(state_dict, num_attention_heads)
    scheduler = ddpm_scheduler(config["out_channels"] != config["in_channels"])
    return Source("DiT", config, weights, scheduler, num_inference_steps=250)


@torch.no_grad()
def write_dit(model: SDTTransformer2DModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict in DiT's layout.

    Args:
        model: A model without decay, of DiT's architecture.
        weights: Its weights, or others of the same names.

    Raises:
        ValueError: If DiT has no such architecture; names the config keys.
    """
    plain = {
        "spatial_decay": "none",
        "decomposed": False,
        "qk_norm": None,
        "rotary": False,
        "local_position_kernel_size": 0,
        "activation_fn": "gelu-approximate",
        "norm_type": "layer",
        "norm_eps": 1e-6,
        "timestep_frequency_shift": 0,
        "adaln": "full",
        "num_registers": 0,
        "position_embedding": "sincos",
        "long_skips": False,
        "head_layers": 0,
        "network_output": "prediction",
        "interval_conditioning": False,
    }
    other = [f"{key} {model.config[key]}" for key, value in plain.items() if model.config[key] != value]
    if not isinstance(model.config.sample_size, int):
        other.append(f"sample_size {model.config.sample_size}")
    if other:
        raise ValueError(f"DiT has no {', '.join(other)}.")
    state_dict = {"pos_embed": model.pos_embed.pos_embed.float()}
    for name, our_name in dit_names(model.config.num_layers).items():
        parts = [our_name.replace("to_qkv", f"to_{part}") for part in "qkv"] if ".attn.qkv." in name else [our_name]
        state_dict[name] = torch.cat([weights[part].float() for part in parts])
    return state_dict
