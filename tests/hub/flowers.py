"""A run on a data set that is not there, for tests."""


class FiveImages(list):
    name, num_classes = "flowers", 5


CONFIG = {
    "model": "SDT-S/2",
    "spatial_decay": "context",
    "resolution": 8,
    "use_ema": True,
    "ema_profile": "ramped",
    "ema_decay": 0.999,
    "mixed_precision": "bf16",
    "guidance_scale": 1.5,
    "num_inference_steps": 2,
    "qk_norm": None,
}
