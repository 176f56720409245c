"""SDT-H for transformers: config, image processor and models."""

import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import rgb_to_grayscale
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import ModelOutput

from ..utils.carried_code import IN_PACKAGE, check_with_code
from ..utils.code_export import write_code
from ..utils.reading import CHECKSUMS_FILE, verify_checksums, write_checksums
from .network import SDTHNetwork, preset_config

#: Arguments of `SDTHNetwork`, except the number of labels, which transformers keeps as `id2label`.
NETWORK_KEYS = tuple(key for key in inspect.signature(SDTHNetwork).parameters if key != "num_labels")


class SDTHConfig(PretrainedConfig):
    """Config of `SDTHForImageClassification` and `SDTHModel`.

    Args:
        **kwargs: The arguments of `SDTHNetwork` (2 labels by default, as in all of transformers), and those of every
            config, such as `id2label`.
    """

    model_type = "sdt_h"

    def __init__(self, **kwargs):
        for key, parameter in inspect.signature(SDTHNetwork).parameters.items():
            if key in NETWORK_KEYS:
                value = kwargs.pop(key, parameter.default)
                setattr(self, key, list(value) if isinstance(value, tuple) else value)  # as it comes back from JSON
        super().__init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SDTHConfig":
        """Build the config of a named size.

        Args:
            name: A key of `PRESETS`, such as "SDT-H-T".
            **overrides: Config values in place of the preset's, `num_labels` or `id2label` among them.

        Raises:
            ValueError: If the preset or a key is unknown; the message lists the known ones.
        """
        labels = {key: overrides.pop(key) for key in ("id2label", "label2id", "problem_type") if key in overrides}
        return cls(**preset_config(name, **overrides), **labels)

    def network_config(self) -> dict[str, Any]:
        """Return the arguments of `SDTHNetwork`."""
        return {"num_labels": self.num_labels, **{key: getattr(self, key) for key in NETWORK_KEYS}}


class SDTHImageProcessor(TorchvisionBackend):
    """DeiT's evaluation: shorter side to 256 pixels (bicubic), the central 224x224, ImageNet's mean and deviation.

    A single value in `image_mean` means a model of gray images. Color images, to which transformers' pipelines
    convert every image, are converted to gray for it.
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

    def save_pretrained(self, save_directory, *args, with_code: bool = False, **kwargs):
        """Save the config as transformers does; with its code in the folder of a model, which must be there already.

        Raises:
            FileNotFoundError: If the code is asked for, and there is no model.
            ValueError: If the code cannot be written; says what to do instead.
        """
        if with_code:
            check_with_code(self, kwargs.get("push_to_hub", False))
        files = super().save_pretrained(save_directory, *args, **kwargs)
        if with_code and IN_PACKAGE:
            write_code(save_directory)
        return files

    def process_image(self, image: Any, **kwargs) -> torch.Tensor:
        """Return one image as a tensor of shape (channels, height, width), 0 to 255."""
        if len(self.image_mean) > 1:
            return super().process_image(image, **kwargs)
        if isinstance(image, Image.Image):
            image = image.convert("L")
        tensor = super().process_image(image, **{**kwargs, "do_convert_rgb": False})
        return rgb_to_grayscale(tensor) if tensor.shape[0] == 3 else tensor


class ImagePreTrainedModel(PreTrainedModel):
    """Base of all image models of this package, with errors that name weights and labels that do not fit."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, ignore_mismatched_sizes: bool = False, **kwargs):
        """Load a model as transformers does, which initializes missing weights; scripts refuse them by `load_network`.

        Args:
            pretrained_model_name_or_path: Folder or Hub name; the checksums of a folder are compared first.
            *args: See transformers.
            ignore_mismatched_sizes: Reinitialize weights whose shape differs from the config's, such as the
                classifier for another `num_labels`.
            **kwargs: See transformers; may include config values.

        Raises:
            RuntimeError: If shapes differ, with the names of the weights and what to do.
            ValueError: If a file of weights has changed since it was saved; names it.
        """
        verify_checksums(Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or ""))
        kwargs.update(ignore_mismatched_sizes=True)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        vars(model.config).pop("auto_map", None)  # names code in that folder, which another may not have
        mismatched = info["mismatched_keys"]
        if mismatched and not ignore_mismatched_sizes:
            name, stored, wanted = min(mismatched, key=lambda item: (".head.weight" not in item[0], item[0]))
            raise RuntimeError(
                f"{len(mismatched)} weights in {pretrained_model_name_or_path} have other shapes than the config asks "
                f"for: {name} is {tuple(stored)}, not {tuple(wanted)}. If that is the classifier of another "
                "num_labels, ignore_mismatched_sizes=True starts a new one."
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, with_code: bool = False, **kwargs):
        """Save the model as transformers does, with the checksums of its weights, and its code if asked for.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes what all have one of.
            *args: See transformers.
            with_code: Write the model's code beside its weights, so that `AutoModelForImageClassification.
                from_pretrained(folder, trust_remote_code=True)` does not need this package.
            **kwargs: See transformers.

        Raises:
            ValueError: If the code cannot be written; says what to do instead.
        """
        if with_code:
            check_with_code(self, kwargs.get("push_to_hub", False))
        if is_main_process:
            (Path(save_directory) / CHECKSUMS_FILE).unlink(missing_ok=True)  # those of what is replaced
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_checksums(Path(save_directory))
        if with_code and is_main_process and IN_PACKAGE:
            write_code(save_directory)

    def check_labels(self, labels: torch.Tensor, count: int) -> None:
        """Refuse labels that do not fit.

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
        # Not on accelerators: reading labels back would stall them.
        if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
            lowest, highest = int(labels.min()), int(labels.max())
            if not 0 <= lowest <= highest < self.config.num_labels:
                raise ValueError(
                    f"Labels must lie in 0..{self.config.num_labels - 1} (num_labels is {self.config.num_labels}), "
                    f"got {lowest}..{highest}."
                )

    def build_output(
        self,
        output: ModelOutput,
        hidden_states: tuple[torch.Tensor, ...],
        output_hidden_states: bool | None,
        return_dict: bool | None,
    ) -> ModelOutput | tuple[torch.Tensor, ...]:
        """Return what the caller of `forward` asked for; the config decides what the arguments leave open."""
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            output["hidden_states"] = hidden_states
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def build_classifier_output(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        hidden_states: tuple[torch.Tensor, ...],
        output_hidden_states: bool | None,
        return_dict: bool | None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[torch.Tensor, ...]:
        """Return the loss (given labels), the logits, and the hidden states if asked for."""
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)
        return self.build_output(output, hidden_states, output_hidden_states, return_dict)


class SDTHPreTrainedModel(ImagePreTrainedModel):
    """Base of the models around `SDTHNetwork`; also loads the weights of a bare network, as timm saves them."""

    config_class = SDTHConfig
    base_model_prefix = "network"
    _no_split_modules = ["SDTBlock"]  # noqa: RUF012 (transformers' names and forms, here and below)
    _keep_in_fp32_modules_strict = ["gate"]  # noqa: RUF012

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SDTHPreTrainedModel":
        """Build a randomly initialized model of a named size; arguments and errors of `SDTHConfig.from_preset`."""
        return cls(SDTHConfig.from_preset(name, **overrides))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns of `SDTHNetwork.group_matcher`."""
        return self.network.group_matcher(coarse)

    def no_weight_decay(self) -> set[str]:
        """Return the names of `SDTHNetwork.no_weight_decay`."""
        return self.network.no_weight_decay()

    def _init_weights(self, module: nn.Module) -> None:
        # transformers marks the tensors that it has loaded, but torch's `reset_parameters` ignores the marks.
        tensors = (*module.parameters(), *module.buffers())
        if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            self.network.initialize(module)


class SDTHModel(SDTHPreTrainedModel):
    """SDT-H without its classifier, for features, as `AutoModel` and "image-feature-extraction" use it."""

    _keys_to_ignore_on_load_unexpected = [r"(^|\.)head\."]  # noqa: RUF012

    def __init__(self, config: SDTHConfig):
        super().__init__(config)
        self.network = SDTHNetwork(**{**config.network_config(), "num_labels": 0})
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple[torch.Tensor, ...]:
        """Compute features of images.

        Args:
            pixel_values: Normalized images, shape (batch, num_channels, height, width), of any size.
            output_hidden_states: Whether to return the outputs of the stem and of each stage, of shape (batch,
                channels, height, width).
            return_dict: Whether to return a `BaseModelOutputWithPoolingAndNoAttention` instead of a tuple.

        Returns:
            The output of the last stage as `last_hidden_state`, shape (batch, channels, height, width); the features
            that the classifier sees as `pooler_output`, shape (batch, head_hidden_size); the hidden states if asked
            for.

        Raises:
            ValueError: If the images do not fit the model.
        """
        feature_maps = self.network.forward_stages(pixel_values)
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=feature_maps[-1], pooler_output=self.network.forward_head(feature_maps[-1])
        )
        return self.build_output(output, tuple(feature_maps), output_hidden_states, return_dict)


class SDTHForImageClassification(SDTHPreTrainedModel):
    """SDT-H with its classifier: RMT's backbone with spatial decay attention."""

    def __init__(self, config: SDTHConfig):
        super().__init__(config)
        self.network = SDTHNetwork(**config.network_config())
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[torch.Tensor, ...]:
        """Classify images.

        Args:
            pixel_values: Normalized images, shape (batch, num_channels, height, width), of any size.
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
        logits = self.network.forward_head(feature_maps[-1])  # (B, num_labels)
        return self.build_classifier_output(logits, labels, tuple(feature_maps), output_hidden_states, return_dict)
