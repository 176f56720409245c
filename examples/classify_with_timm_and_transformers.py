"""Make SDT-H by timm and by transformers: `python examples/classify_with_timm_and_transformers.py`.

One import registers the classifiers with both libraries. The weights here are random: train_classifier.py trains them.
"""

import tempfile

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import pipeline

from sdt_diffusion.classification import SDTHConfig, SDTHForImageClassification, SDTHImageProcessor

if __name__ == "__main__":
    # timm: a backbone that gives the feature maps of all stages.
    backbone = timm.create_model("sdt_h_tiny", features_only=True).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 64))
    for stage, features in zip(backbone.feature_info.info, maps, strict=True):
        print(f"{stage['module']}: {stage['num_chs']} channels at 1/{stage['reduction']}: {tuple(features.shape)}")

    # transformers: the classifier of 8x8 gray digits, saved with its image processor, and found by the Auto classes.
    folder = tempfile.mkdtemp()
    config = SDTHConfig.from_preset("SDT-H-digits", num_labels=10, num_channels=1)
    SDTHForImageClassification(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    SDTHImageProcessor(size=size, do_center_crop=False, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    classify = pipeline("image-classification", model=folder)
    digit = Image.fromarray((load_digits().images[0] * 15).astype("uint8"))
    print(classify(digit, top_k=3))
