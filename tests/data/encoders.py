"""Tiny vision encoders with random weights, saved as transformers saves them."""

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from sdt_diffusion.sdt_h.modeling_sdt_h import SDTHConfig, SDTHForImageClassification

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def _clip():
    vision = {**SIZES, "image_size": 16, "patch_size": 4}
    text = {**SIZES, "vocab_size": 8, "max_position_embeddings": 4, "bos_token_id": 0, "eos_token_id": 1}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))


#: Name -> what builds the encoder for images of 16 pixels, and the tokens in front of its 4 x 4 patches.
ENCODERS = {
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=16, patch_size=4)), 1),
    "registers": (
        lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**SIZES, image_size=16, patch_size=4, num_register_tokens=3)
        ),
        4,
    ),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=16, patch_size=4)), 0),
    "clip": (_clip, 1),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4)), 1),
}


def save_encoder(folder, name="dinov2", size=None, **processor):
    """Save an encoder with its image processor."""
    torch.manual_seed(0)
    ENCODERS[name][0]().save_pretrained(folder)
    return save_processor(folder, size, **processor)


def save_sdt_h(folder, side=16):
    """Save an SDT-H classifier, whose stages have grids of 4 x 4 and 2 x 2 for images of 16 pixels."""
    torch.manual_seed(0)
    config = SDTHConfig(
        **{"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [2, 2], "mlp_ratios": [2, 2]},
        **{"decay_heads_ranges": [4, 4], "decomposed": [False, False], "layer_scale_init_values": [None, None]},
        **{"head_hidden_size": 16, "stem_strides": [2, 2], "num_labels": 3},
    )
    SDTHForImageClassification(config).save_pretrained(folder)
    return save_processor(folder, side)


def save_processor(folder, side=None, **changes):
    """Save an image processor that resizes, crops the center and normalizes, as DINOv2's does."""
    size, crop = {"shortest_edge": (side or 16) + 4}, {"height": side or 16, "width": side or 16}
    settings = {"size": size, "crop_size": crop, "image_mean": MEAN, "image_std": STD, **changes}
    CLIPImageProcessorPil(**settings).save_pretrained(folder)
    return str(folder)
