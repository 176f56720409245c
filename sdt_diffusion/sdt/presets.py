"""Named sizes of `SDTTransformer2DModel`."""

from typing import Any

#: Size -> config. Parameters (patch 2, 4 channels, 1000 classes, `context`) as counted by tests/sdt; DiT's sizes.
SIZES: dict[str, dict[str, int]] = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},  # 32.9M
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},  # 130.5M
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},  # 458.6M
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},  # 675.8M
}

#: Preset -> config, for `SDTTransformer2DModel.from_preset`.
PRESETS: dict[str, dict[str, Any]] = {
    f"SDT-{size}/{patch_size}": {**config, "patch_size": patch_size, "sample_size": 32, "in_channels": 4}
    for size, config in SIZES.items()
    for patch_size in (2, 4, 8)
}
# 8x8 gray pixels, 10 classes: scikit-learn's digits.
PRESETS["SDT-digits"] = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "patch_size": 2,
    "sample_size": 8,
    "in_channels": 1,
    "num_classes": 10,
}
