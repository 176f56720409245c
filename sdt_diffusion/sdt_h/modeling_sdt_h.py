"""SDTHForImageClassification: the classifier's transformers face."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from .configuration_sdt_h import SDTHConfig
from .network import SDTHNetwork


class ImageClassifierModel(PreTrainedModel):
    """A `PreTrainedModel` that says what is wrong with weights and labels."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, ignore_mismatched_sizes: bool = False, **kwargs):
        """transformers' `from_pretrained`.

        Args:
            pretrained_model_name_or_path: Folder or Hub name.
            *args: See transformers.
            ignore_mismatched_sizes: Initialise weights whose shape differs from the config's anew, such as the
                classifier for another `num_labels`.
            **kwargs: See transformers; config values among them.

        Raises:
            RuntimeError: If shapes differ, with the names of the weights and what to do.
        """
        kwargs.update(ignore_mismatched_sizes=True)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        mismatched = info["mismatched_keys"]
        if mismatched and not ignore_mismatched_sizes:
            name, stored, wanted = min(mismatched, key=lambda item: (".head.weight" not in item[0], item[0]))
            raise RuntimeError(
                f"{len(mismatched)} weights in {pretrained_model_name_or_path} have other shapes than the config asks "
                f"for: {name} is {tuple(stored)}, not {tuple(wanted)}. If that is the classifier of another "
                "num_labels, ignore_mismatched_sizes=True starts a new one."
            )
        return (model, info) if wants_info else model

    def check_labels(self, labels: torch.Tensor, count: int) -> None:
        """Refuses labels that do not fit.

        Args:
            labels: Classes, shape (count,); other forms, such as soft targets, are floating-point and pass.
            count: Number of images.

        Raises:
            ValueError: If there are not as many labels as images, or one is not 0 to num_labels - 1.
        """
        if labels.is_floating_point():
            return
        if labels.shape != (count,):
            raise ValueError(f"{count} images need as many labels, not a tensor of shape {tuple(labels.shape)}.")
        # Reading labels back from an accelerator would stall it.
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            lowest, highest = int(labels.min()), int(labels.max())
            if not 0 <= lowest <= highest < self.config.num_labels:
                raise ValueError(
                    f"Labels must lie in 0..{self.config.num_labels - 1} (num_labels is {self.config.num_labels}), "
                    f"got {lowest}..{highest}."
                )

    def build_output(
        self,
        logits: torch.Tensor,
        hidden_states: tuple[torch.Tensor, ...],
        labels: torch.Tensor | None,
        output_hidden_states: bool | None,
        return_dict: bool | None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[torch.Tensor, ...]:
        """What `forward` returns of its logits and hidden states; the config decides what the arguments leave open."""
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = ImageClassifierOutputWithNoAttention(
            loss=loss, logits=logits, hidden_states=hidden_states if output_hidden_states else None
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


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
