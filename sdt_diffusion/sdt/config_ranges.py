"""Values that the config of a transformer may have."""

from typing import Any

from ..attention.gate import MAX_EXPONENT
from ..utils.ranges import Range, check_value

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
}
#: A config of more parameters is a mistake, which would only show when memory is asked for.
MAX_PARAMETERS = 1e11


def check_ranges(config: dict[str, Any]) -> None:
    """Check the numbers and switches of a config.

    Raises:
        ValueError: If one is out of its range; names the key and the value.
    """
    for name, (kind, allowed) in RANGES.items():
        value = config[name]
        for item in value if name == "sample_size" and isinstance(value, (list, tuple)) else [value]:
            if not (item is None and name == "out_channels"):
                check_value(name, item, (kind,), allowed)
    if isinstance(config["sample_size"], (list, tuple)) and len(config["sample_size"]) != 2:
        raise ValueError(f"sample_size must be one number, or height and width, not {config['sample_size']}.")
    for name in ("decomposed", "gate_conditioning", "rotary"):
        if config[name] not in (True, False):
            raise ValueError(f"{name} must be true or false, not {config[name]!r}.")
