"""SDTHForImageClassification: the classifier's transformers face."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from .base import ImageClassifierModel
from .configuration_sdt_h import SDTHConfig
from .network import SDTHNetwork


class SDTHForImageClassification(ImageClassifierModel):
    """`SDTHNetwork` as a transformers model: RMT's backbone with spatial decay attention, and a classifier.

    Weights of a bare `SDTHNetwork`, which are also those of the timm models, load as well.
    """

    config_class = SDTHConfig
    base_model_prefix = "network"
    _no_split_modules = ["SDTBlock"]  # noqa: RUF012 (transformers' names and forms, here and below)
    _keep_in_fp32_modules_strict = ["gate"]  # noqa: RUF012

    def __init__(self, config: SDTHConfig):
        super().__init__(config)
        self.network = SDTHNetwork(**config.network_config())
        self.post_init()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SDTHForImageClassification":
        """A randomly initialised model of a named size; arguments and errors of `SDTHConfig.from_preset`."""
        return cls(SDTHConfig.from_preset(name, **overrides))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """See `SDTHNetwork.group_matcher`."""
        return self.network.group_matcher(coarse)

    def no_weight_decay(self) -> set[str]:
        """See `SDTHNetwork.no_weight_decay`."""
        return self.network.no_weight_decay()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers marks the tensors it has loaded, but torch's own resets heed no marks.
        tensors = (*module.parameters(), *module.buffers())
        if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            self.network.initialize(module)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[torch.Tensor, ...]:
        """Classifies images.

        Args:
            pixel_values: Normalised images, shape (batch, num_channels, height, width), of any size.
            labels: Class of each image, 0 to num_labels - 1, shape (batch,), for the loss; other forms as the config's
                `problem_type` asks.
            output_hidden_states: Whether to return the outputs of the stem and of each stage, of shape (batch,
                channels, height, width).
            return_dict: Whether to return an `ImageClassifierOutputWithNoAttention` instead of a tuple.

        Returns:
            The loss (given labels), the logits of shape (batch, num_labels), and the hidden states (if asked for).

        Raises:
            ValueError: If images or labels do not fit the model.
        """
        if labels is not None:
            self.check_labels(labels, len(pixel_values))
        feature_maps = self.network.forward_stages(pixel_values)
        logits = self.network.forward_head(feature_maps[-1])
        return self.build_output(logits, tuple(feature_maps), labels, output_hidden_states, return_dict)
