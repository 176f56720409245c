"""The classifier SDT-H, and a classifier on features of generative transformers.

Importing this module registers both with transformers' Auto classes and pipelines, and SDT-H with timm.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from .probe import SDTClassifierConfig, SDTForImageClassification, SDTModel
from .sdt_h.convert_rmt import load_rmt
from .sdt_h.modeling_sdt_h import SDTHConfig, SDTHForImageClassification, SDTHImageProcessor, SDTHModel
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
    "SDTHModel",
    "SDTHNetwork",
    "SDTModel",
    "load_rmt",
]

for _config, _model, _classifier in (
    (SDTHConfig, SDTHModel, SDTHForImageClassification),
    (SDTClassifierConfig, SDTModel, SDTForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)
    AutoImageProcessor.register(_config, image_processor_classes={"torchvision": SDTHImageProcessor}, exist_ok=True)
