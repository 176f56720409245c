"""SDTHImageProcessor, which turns pictures into `pixel_values`."""

from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import rgb_to_grayscale
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


class SDTHImageProcessor(TorchvisionBackend):
    """DeiT's evaluation: shorter side to 256 pixels (bicubic), the central 224x224, ImageNet's mean and deviation.

    A single value in `image_mean` means a model of gray images. Color pictures, which transformers' pipelines make of
    every picture, are turned to gray for it.
    """

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 256}  # noqa: RUF012 (transformers' forms)
    crop_size = {"height": 224, "width": 224}  # noqa: RUF012
    default_to_square = False
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_convert_rgb = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    def process_image(self, image: Any, **kwargs) -> torch.Tensor:
        """Return one image as a tensor of shape (channels, height, width), 0 to 255."""
        if len(self.image_mean) > 1:
            return super().process_image(image, **kwargs)
        if isinstance(image, Image.Image):
            image = image.convert("L")
        tensor = super().process_image(image, **{**kwargs, "do_convert_rgb": False})
        return rgb_to_grayscale(tensor) if tensor.shape[0] == 3 else tensor
