"""Named sizes of `SDTTransformer2DModel`."""

from typing import Any

#: Size -> config; DiT's sizes. Parameters (patch 2, 4 channels, 1000 classes, `context`) as counted by tests/sdt; `+`
#: changes them by less than 0.1%.
SIZES: dict[str, dict[str, int]] = {
    "S": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},  # 32.9M
    "B": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},  # 130.5M
    "L": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},  # 458.6M
    "XL": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},  # 675.8M
}
#: Patch size -> images: Stable Diffusion's latents of 256x256; for 1 wide latents, as LightningDiT's; for 16 pixels of
#: 256x256, of which the network makes the clean image, as JiT's.
IMAGES: dict[int, dict[str, Any]] = {
    1: {"sample_size": 16, "in_channels": 32},
    2: {"sample_size": 32, "in_channels": 4},
    4: {"sample_size": 32, "in_channels": 4},
    8: {"sample_size": 32, "in_channels": 4},
    16: {"sample_size": 256, "in_channels": 3, "network_output": "clean"},
}
#: What a `+` at the end of a preset's name adds: the block of LightningDiT and JiT. SwiGLU has three matrices, of two
#: thirds of the width, and so as many parameters as DiT's MLP.
PLUS: dict[str, Any] = {
    "norm_type": "rms",
    "activation_fn": "swiglu",
    "mlp_ratio": 8 / 3,
    "qk_norm": "rms_norm",
    "rotary": True,
}

#: Preset -> config, for `SDTTransformer2DModel.from_preset`.
PRESETS: dict[str, dict[str, Any]] = {
    f"SDT-{size}/{patch_size}{plus}": {**config, "patch_size": patch_size, **images, **(PLUS if plus else {})}
    for plus in ("", "+")
    for size, config in SIZES.items()
    for patch_size, images in IMAGES.items()
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
