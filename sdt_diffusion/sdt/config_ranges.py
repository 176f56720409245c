"""Values that the config of a transformer may have."""

from collections.abc import Sequence
from typing import Any

from ..attention.gate import MAX_EXPONENT
from ..blocks import ADALN_KINDS
from ..utils.ranges import Range, check_number, check_value
from .grid_scaling import check_grid_scaling

#: Values that the numbers of a config may have; those of int type are whole.
RANGES: dict[str, tuple[type, Range]] = {
    "num_attention_heads": (int, Range(1, 1024)),
    "attention_head_dim": (int, Range(1, 4096)),
    "in_channels": (int, Range(1, 4096)),
    "out_channels": (int, Range(1, 8192)),
    "num_layers": (int, Range(1, 1000)),
    "sample_size": (int, Range(1, 16_384)),
    "patch_size": (int, Range(1, 1024)),
    "num_classes": (int, Range(1, 10_000_000)),
    "mlp_ratio": (float, Range(0, 64, with_least=False)),
    "dropout": (float, Range(0, 1, with_most=False)),
    "class_dropout_prob": (float, Range(0, 1)),
    "decay_initial_value": (float, Range(-MAX_EXPONENT, MAX_EXPONENT)),
    "decay_heads_range": (float, Range(-MAX_EXPONENT, MAX_EXPONENT)),
    "local_position_kernel_size": (int, Range(0, 255)),
    "frequency_embedding_size": (int, Range(2, 65_536)),
    "timestep_scale": (float, Range(0, 1e6, with_least=False)),
    "timestep_frequency_shift": (float, Range(0, 1)),
    "norm_eps": (float, Range(0, 1)),
    "adaln_rank": (int, Range(1, 65_536)),
    "num_registers": (int, Range(0, 4096)),
    "head_layers": (int, Range(0, 100)),
    "head_width": (int, Range(4, 65_536)),
}
#: Values of the config key `position_embedding`.
POSITION_EMBEDDINGS = {"sincos": "sines and cosines (DiT)", "none": "none added to the patches"}
#: Values of the config key `network_output`: what the last layer's output is.
NETWORK_OUTPUTS = {
    "prediction": "what the model returns: noise, v or flow, as it was trained",
    "clean": "the clean image, from which the model computes the flow that it returns (JiT)",
}
KINDS_OF_OPTIONS = {"adaln": ADALN_KINDS, "position_embedding": POSITION_EMBEDDINGS, "network_output": NETWORK_OUTPUTS}
SWITCHES = ("decomposed", "gate_conditioning", "rotary", "long_skips", "interval_conditioning")
#: A config of more parameters is a mistake, which would only show when memory is asked for.
MAX_PARAMETERS = 1e11


def check_config(config: dict[str, Any]) -> None:
    """Refuse a config that makes no model.

    Raises:
        ValueError: If a value is out of its range, or contradicts another; names the keys and the values.
    """
    _check_values(config)
    check_grid_scaling(config)
    height, width = sides(config["sample_size"])
    patch_size, head_dim = config["patch_size"], config["attention_head_dim"]
    if height % patch_size or width % patch_size:
        raise ValueError(f"sample_size {height}x{width} is not divisible by patch_size {patch_size}.")
    dim = config["num_attention_heads"] * head_dim
    if dim % 4:
        raise ValueError(f"The width {dim} must be divisible by 4 for the position embedding.")
    if config["rotary"] and head_dim % 4:
        raise ValueError(f"attention_head_dim {head_dim} must be divisible by 4 for rotary embeddings.")
    if config["network_output"] == "clean" and config["out_channels"] not in (None, config["in_channels"]):
        raise ValueError(
            f"network_output 'clean' needs as many out_channels as in_channels, {config['in_channels']}, not "
            f"{config['out_channels']}: it learns no variance."
        )
    if config["head_layers"]:
        _check_head(config)
    tokens, per_block = height * width // patch_size**2, (10 + 2 * config["mlp_ratio"]) * dim**2
    parameters = config["num_layers"] * per_block + (config["num_classes"] + tokens) * dim
    parameters += config["head_layers"] * (10 + 2 * config["mlp_ratio"]) * config["head_width"] ** 2
    check_number("The number of parameters", parameters, Range(0, MAX_PARAMETERS))


def sides(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of a `sample_size`, which is one number if they are equal."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height, width


def _check_head(config: dict[str, Any]) -> None:
    head_width, heads = config["head_width"], config["num_attention_heads"]
    divisor = 4 * heads if config["rotary"] else heads
    if head_width % divisor or head_width % 4:
        rotary = ", each divisible by 4 for rotary embeddings" if config["rotary"] else ""
        raise ValueError(f"head_width {head_width} must be divisible by 4 and by num_attention_heads {heads}{rotary}.")


def _check_values(config: dict[str, Any]) -> None:
    for name, (kind, allowed) in RANGES.items():
        value = config[name]
        for item in value if name == "sample_size" and isinstance(value, (list, tuple)) else [value]:
            if not (item is None and name == "out_channels"):
                check_value(name, item, (kind,), allowed)
    if isinstance(config["sample_size"], (list, tuple)) and len(config["sample_size"]) != 2:
        raise ValueError(f"sample_size must be one number, or height and width, not {config['sample_size']}.")
    for name in SWITCHES:
        if config[name] not in (True, False):
            raise ValueError(f"{name} must be true or false, not {config[name]!r}.")
    for name, choices in KINDS_OF_OPTIONS.items():
        if not isinstance(config[name], str) or config[name] not in choices:
            raise ValueError(f"{name} must be {' or '.join(choices)}, not {config[name]!r}.")
