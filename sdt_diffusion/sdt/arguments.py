"""The model as training arguments."""

from dataclasses import dataclass, field
from typing import Literal

from ..command_line import json_object
from .transformer_sdt import SDTTransformer2DModel


@dataclass
class ModelArguments:
    """What to train."""

    model: str = field(default="SDT-S/2", metadata={"help": "A preset: SDT-{S,B,L,XL}/{2,4,8} or SDT-digits."})
    spatial_decay: Literal["context", "fixed", "content", "raster", "none"] = field(
        default="context", metadata={"help": "How attention decays; 'none' is a plain DiT."}
    )
    qk_norm: Literal["rms_norm"] | None = field(default=None, metadata={"help": "Normalise queries and keys."})
    rotary: bool = field(default=False, metadata={"help": "2D rotary embedding."})
    local_position_kernel_size: int = field(default=0, metadata={"help": "Local position encoding; 0 for none."})
    class_dropout_prob: float = field(default=0.1, metadata={"help": "Labels dropped, for guidance."})
    model_overrides: str | None = field(
        default=None, metadata={"help": 'Further config values as JSON, such as {"num_layers": 6}.'}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade speed for memory."})
    pretrained_vae_model_name_or_path: str | None = field(
        default=None, metadata={"help": "VAE to train in the latents of; a cache's own, else none: pixels."}
    )

    def config(self, **overrides) -> dict:
        """The model's config: the preset's, these arguments' over it, and `overrides` over both.

        Raises:
            ValueError: If the preset or a key is unknown, or `model_overrides` is no JSON object.
        """
        further = json_object(self.model_overrides, "--model_overrides")
        derived = sorted({"in_channels", "num_classes", "sample_size"} & set(further))
        if derived:
            raise ValueError(f"--model_overrides: {', '.join(derived)} follow from the data set and --resolution.")
        keys = ("spatial_decay", "qk_norm", "rotary", "local_position_kernel_size", "class_dropout_prob")
        own = {key: getattr(self, key) for key in keys}
        return SDTTransformer2DModel.preset_config(self.model, **{**own, **further, **overrides})

    def build(self, **overrides) -> SDTTransformer2DModel:
        """The randomly initialised model of `config(**overrides)`."""
        model = SDTTransformer2DModel(**self.config(**overrides))
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model
