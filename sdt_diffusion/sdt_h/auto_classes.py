"""Importing this module registers SDT-H with transformers' Auto classes and pipelines."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from .modeling_sdt_h import SDTHConfig, SDTHForImageClassification, SDTHImageProcessor, SDTHModel


def register(config: type[PretrainedConfig], model: type[PreTrainedModel], classifier: type[PreTrainedModel]) -> None:
    """Let the Auto classes load a config, the model and the classifier that it describes, and SDT-H's processor."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForImageClassification.register(config, classifier, exist_ok=True)
    AutoImageProcessor.register(config, image_processor_classes={"torchvision": SDTHImageProcessor}, exist_ok=True)


register(SDTHConfig, SDTHModel, SDTHForImageClassification)
