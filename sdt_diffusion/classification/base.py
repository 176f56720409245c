"""What both image classifiers share of transformers' habits."""

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


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
