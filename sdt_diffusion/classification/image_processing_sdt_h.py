"""SDTHImageProcessor: from pictures to `pixel_values`."""

from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling


class SDTHImageProcessor(TorchvisionBackend):
    """DeiT's evaluation: shorter side to 256 pixels (bicubic), the central 224x224, ImageNet's mean and deviation."""

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
