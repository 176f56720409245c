"""The classifier SDT-H. Importing this makes transformers' Auto classes and pipelines, and timm, find it."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from .configuration_sdt_h import SDTHConfig
from .convert_rmt import load_rmt
from .image_processing_sdt_h import SDTHImageProcessor
from .modeling_sdt_h import SDTHForImageClassification
from .network import PRESETS, SDTHNetwork
from .timm_sdt_h import SDTHForTimm

__all__ = [
    "PRESETS",
    "SDTHConfig",
    "SDTHForImageClassification",
    "SDTHForTimm",
    "SDTHImageProcessor",
    "SDTHNetwork",
    "load_rmt",
]

AutoConfig.register(SDTHConfig.model_type, SDTHConfig, exist_ok=True)
AutoModelForImageClassification.register(SDTHConfig, SDTHForImageClassification, exist_ok=True)
AutoImageProcessor.register(SDTHConfig, image_processor_classes={"torchvision": SDTHImageProcessor}, exist_ok=True)
