"""Stand-ins in the formats of ImageNet's pipeline: 200 images in class folders, a VAE, an image classifier.

python tests/small_imagenet.py OUTPUT_DIR
"""

import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

CLASSES, IMAGES_A_CLASS = 10, 20


def main(argv):
    output_dir = Path(argv[0])
    for label in range(CLASSES):
        folder = output_dir / "images" / f"n{label:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(IMAGES_A_CLASS):
            make_image(label, number).save(folder / f"{folder.name}_{number}.JPEG", quality=90)
    torch.manual_seed(0)
    make_vae().save_pretrained(output_dir / "vae")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(**size, image_size=64, patch_size=16, num_labels=CLASSES)
    ViTForImageClassification(config).save_pretrained(output_dir / "classifier")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(output_dir / "classifier")


def make_image(label, number):
    """Stripes whose direction is the class; sides between 260 and 380 pixels, upright or lying, as photographs are."""
    random = np.random.default_rng([label, number])
    height, width = random.integers(260, 380, 2)
    y, x = np.mgrid[:height, :width] / 40
    angle = np.pi * label / CLASSES
    phases = random.uniform(0, 2 * np.pi, 3)
    waves = [np.sin(np.cos(angle) * x + np.sin(angle) * y + phase) for phase in phases]
    return Image.fromarray((127.5 + 110 * np.stack(waves, axis=-1)).astype(np.uint8))


def make_vae():
    """Stable Diffusion's VAE, but narrow and random: 8 pixels a latent, 4 channels."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
