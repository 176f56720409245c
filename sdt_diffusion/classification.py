"""The classifier SDT-H, and a classifier on features of generative transformers.

Importing this module registers both with transformers' Auto classes and pipelines, and SDT-H with timm.
"""

from .probe import SDTClassifierConfig, SDTForImageClassification, SDTModel
from .sdt_h.auto_classes import register
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

register(SDTClassifierConfig, SDTModel, SDTForImageClassification)
