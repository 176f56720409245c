"""The classifier SDT-H, and a head on generative transformers.

Importing this makes transformers' Auto classes and pipelines find both, and timm SDT-H.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from .probe import SDTClassifierConfig, SDTForImageClassification
from .sdt_h.configuration_sdt_h import SDTHConfig
from .sdt_h.convert_rmt import load_rmt
from .sdt_h.image_processing_sdt_h import SDTHImageProcessor
from .sdt_h.modeling_sdt_h import SDTHForImageClassification
from .sdt_h.network import PRESETS, SDTHNetwork
from .sdt_h.timm_sdt_h import SDTHForTimm

__all__ = [
    "PRESETS",
    "SDTClassifierConfig",
    "SDTForImageClassification",
    "SDTHConfig",
    "SDTHForImageClassification",
    "SDTHForTimm",
    "SDTHImageProcessor",
    "SDTHNetwork",
    "load_rmt",
]

for _config, _model in ((SDTHConfig, SDTHForImageClassification), (SDTClassifierConfig, SDTForImageClassification)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": SDTHImageProcessor}, exist_ok=True)
