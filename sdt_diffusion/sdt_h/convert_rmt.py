"""Convert official RMT checkpoints to the classifier with `spatial_decay="fixed"`, which gives RMT's logits."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..attention import FixedGate
from ..utils.reading import read_state_dict
from .modeling_sdt_h import SDTHConfig, SDTHForImageClassification
from .network import PRESETS, raster_rotary_embedding

#: RMT's names -> ours, applied one after the other.
RENAMES = [
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.pos\.conv\.", ".conditional_position.conv."),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.retention\.([qkv])_proj\.", r".attn.to_\1."),
    (r"\.retention\.out_proj\.", ".attn.to_out.0."),
    (r"\.retention\.lepe\.conv\.", ".attn.local_position.conv."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.ffn\.fc1\.", ".ff.net.0.proj."),
    (r"\.ffn\.dwconv\.conv\.", ".ff.local.conv."),
    (r"\.ffn\.fc2\.", ".ff.net.2."),
    (r"\.gamma_([12])$", r".layer_scale\1.gamma"),
]

#: Keys under which checkpoints keep their state dict: RMT's and timm's.
CHECKPOINT_KEYS = ("model", "state_dict")


def rename(key: str) -> str:
    """Return the name that one of RMT's weights has in `SDTHNetwork`."""
    downsample = re.match(r"^layers\.(\d+)\.downsample\.(reduction|norm)\.(.+)$", key)
    if downsample:  # the last layer of a stage in RMT is the first of the next stage here
        stage, module, tensor = downsample.groups()
        return f"stages.{int(stage) + 1}.downsample.{('reduction', 'norm').index(module)}.{tensor}"
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict that torch.save or safetensors wrote, without running code from the file.

    The state dict may be at the top level or under one of `CHECKPOINT_KEYS`; see `read_state_dict` for errors.
    """
    return read_state_dict(Path(path), CHECKPOINT_KEYS)


def rmt_config(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Infer the config of an RMT from its tensors; without `head`, `num_labels` is 0.

    The tensors do not say which stages attend along rows, then along columns: RMT-T's first two, and the first three
    of all larger ones.

    Raises:
        ValueError: If tensors that every RMT has are missing.
    """
    stages = range(len({key.split(".")[1] for key in state_dict if key.startswith("layers.")}))
    try:
        widths = [len(state_dict[f"layers.{i}.blocks.0.final_layer_norm.weight"]) for i in stages]
        hidden = [len(state_dict[f"layers.{i}.blocks.0.ffn.fc1.weight"]) for i in stages]
        decays = [state_dict[f"layers.{i}.Relpos.decay"].double() for i in stages]
        num_channels = state_dict["patch_embed.proj.0.weight"].shape[1]
        head_hidden_size = len(state_dict["proj.weight"])
    except KeyError as error:
        raise ValueError(f"This is not a checkpoint of RMT: it has no {error}.") from error
    except (IndexError, TypeError) as error:
        raise ValueError(f"This is not a checkpoint of RMT: its tensors have other shapes ({error}).") from error
    if not stages or min(*widths, *hidden, *map(torch.numel, decays)) < 1 or any(d.ndim != 1 for d in decays):
        raise ValueError("This is not a checkpoint of RMT: its tensors have other shapes.")
    depths = [len({k.split(".")[3] for k in state_dict if k.startswith(f"layers.{i}.blocks.")}) for i in stages]
    # decay = log(1 - 2^-a); fp32 has rounded away parts in 10,000 of an exponent.
    exponents = [-torch.log2(-torch.expm1(decay)) for decay in decays]
    tiny = depths == list(PRESETS["SDT-H-T"]["depths"])
    return {
        "spatial_decay": "fixed",
        "num_channels": num_channels,
        "num_labels": len(state_dict["head.weight"]) if "head.weight" in state_dict else 0,
        "head_hidden_size": head_hidden_size,
        "hidden_sizes": widths,
        "depths": depths,
        "num_attention_heads": [len(decay) for decay in decays],
        "mlp_ratios": [inner / width for inner, width in zip(hidden, widths, strict=True)],
        "decomposed": [i < (2 if tiny else 3) for i in stages],
        "decay_initial_value": round(exponents[0][0].item(), 2),
        "decay_heads_ranges": [round(((a[-1] - a[0]) * len(a) / max(len(a) - 1, 1)).item(), 2) for a in exponents],
        "layer_scale_init_values": [1e-6 if f"layers.{i}.blocks.0.gamma_1" in state_dict else None for i in stages],
    }


def check_positions(state_dict: Mapping[str, torch.Tensor], config: SDTHConfig) -> None:
    """Compare the tables of decays and of rotary frequencies in an RMT state dict with those of a config.

    Raises:
        ValueError: If they differ.
    """
    for i, heads in enumerate(config.num_attention_heads):
        gate, _ = FixedGate(heads, config.decay_initial_value, config.decay_heads_ranges[i])(torch.zeros(1))
        cosines, sines = raster_rotary_embedding(config.hidden_sizes[i] // heads, 2)
        computed = {"decay": gate.flatten(), "angle": torch.atan2(sines, cosines)[1]}
        for name, expected in computed.items():
            stored = state_dict.get(f"layers.{i}.Relpos.{name}")
            if stored is not None and not (
                stored.shape == expected.shape and torch.allclose(stored.float(), expected, rtol=1e-3, atol=1e-6)
            ):
                raise ValueError(f"layers.{i}.Relpos.{name} of the checkpoint is not what the config gives: {stored}.")


def load_rmt(path: str | Path, **overrides) -> SDTHForImageClassification:
    """Load an official RMT checkpoint.

    The token-label release has a second classifier, `aux_head`, that looks at every token. It is left out with a
    warning: the logits are those of `head`, while RMT's evaluation adds half of the largest auxiliary logits to them.

    Args:
        path: The checkpoint, see `read_checkpoint`.
        **overrides: Config values in place of `rmt_config`'s, such as `id2label`. `spatial_decay="context"` starts
            SDT-H from RMT, with new gates that initially give RMT's decay. A checkpoint without `head` gives the
            features before it as logits, or a new classifier for `num_labels`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If the file holds no RMT, or one that does not fit the overrides.
    """
    state_dict = read_checkpoint(path)
    if any(key.startswith("aux_head.") for key in state_dict):
        warnings.warn(
            f"{path} is of RMT's token-label release: its aux_head is left out, the logits are those of head alone.",
            stacklevel=2,
        )
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith("aux_head.")}
    config = SDTHConfig(**{**rmt_config(state_dict), **overrides})
    check_positions(state_dict, config)
    model = SDTHForImageClassification(config).eval()
    weights = {rename(key): value for key, value in state_dict.items() if ".Relpos." not in key}
    weights = {k: v.flatten() if k.endswith(".gamma") else v for k, v in weights.items()}  # RMT's are (1, 1, 1, dim)
    expected = model.network.state_dict()
    new = {key for key in expected if ".gate." in key}
    if not any(key.startswith("head.") for key in weights):
        new |= {"head.weight", "head.bias"} & expected.keys()
    wrong = sorted((weights.keys() ^ expected.keys()) - new)
    wrong += [key for key in weights.keys() & expected.keys() if weights[key].shape != expected[key].shape]
    if wrong:
        raise ValueError(f"{path} does not fit the config in {len(wrong)} tensor(s), such as {wrong[0]}.")
    model.network.load_state_dict(weights, strict=False)
    return model
