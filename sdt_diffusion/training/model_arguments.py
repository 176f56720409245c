"""Which model train_dit.py trains."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..sdt import PRESETS, SDTTransformer2DModel
from ..utils.arguments import json_object, one_line
from ..utils.ranges import CheckedArguments, between
from .init_from import STORED, adds_decay, load_weights, stored_config

#: Arguments that are keys of the model's config; `None` leaves the preset's value.
CONFIG_KEYS = (
    *("spatial_decay", "qk_norm", "rotary", "position_embedding", "norm_type", "activation_fn", "mlp_ratio"),
    *("adaln", "adaln_rank", "num_registers", "long_skips", "network_output"),
    *("local_position_kernel_size", "class_dropout_prob"),
)


@dataclass(frozen=True)
class ModelArguments(CheckedArguments):
    """Which model to train."""

    model: str = field(
        default="SDT-S/2",
        metadata={
            "help": "A preset: SDT-{S,B,L,XL}/{1,2,4,8,16}, the same with a + at the end (SwiGLU, RMSNorm, QK-norm, "
            "rotary), or SDT-digits; 'stored' for that of --init_from."
        },
    )
    spatial_decay: Literal["context", "fixed", "content", "raster", "none"] = field(
        default="context", metadata={"help": "How attention decays; 'none' is a plain DiT."}
    )
    qk_norm: Literal["rms_norm", "none"] | None = field(
        default=None, metadata={"help": "Normalize queries and keys; the preset's by default, as all that follow."}
    )
    rotary: bool | None = field(default=None, metadata={"help": "2D rotary embedding.", "nargs": "?", "const": True})
    position_embedding: Literal["sincos", "none"] | None = field(
        default=None, metadata={"help": "Position embedding that is added to the patches."}
    )
    norm_type: Literal["layer", "rms"] | None = field(default=None, metadata={"help": "Norm of the tokens."})
    activation_fn: Literal["gelu-approximate", "swiglu"] | None = field(
        default=None,
        metadata={"help": "Activation of the MLP; swiglu at 2/3 of the mlp_ratio has as many parameters."},
    )
    mlp_ratio: float | None = field(
        default=None,
        metadata={"help": "Hidden width of the MLP in units of the width."} | between(0, 64, with_least=False),
    )
    adaln: Literal["full", "single", "low_rank"] | None = field(
        default=None, metadata={"help": "A modulation matrix in each block, one for all, or one plus low ranks."}
    )
    adaln_rank: int | None = field(default=None, metadata={"help": "Rank of low_rank."} | between(1, 65_536))
    num_registers: int | None = field(default=None, metadata={"help": "Register tokens."} | between(0, 4096))
    long_skips: bool | None = field(
        default=None, metadata={"help": "Skips from early blocks to late ones, as U-ViT.", "nargs": "?", "const": True}
    )
    network_output: Literal["prediction", "clean"] | None = field(
        default=None,
        metadata={"help": "Whether the last layer makes the clean image, of which the model computes the flow."},
    )
    local_position_kernel_size: int | None = field(
        default=None, metadata={"help": "Local position encoding; 0 for none."} | between(0, 255)
    )
    class_dropout_prob: float = field(
        default=0.1, metadata={"help": "Fraction of labels dropped, for guidance."} | between(0, 1)
    )
    model_overrides: str | None = field(
        default=None, metadata={"help": 'Further config values as JSON, such as {"num_layers": 6}.'}
    )
    init_from: str | None = field(
        default=None,
        metadata={"help": "Start from the weights of this folder: a pipeline, a transformer, or one of a checkpoint."},
    )
    new_classes: bool = field(
        default=False,
        metadata={
            "help": "The classes are not those of --init_from; what it knows of classes of equal names is kept."
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations to save memory.", "resumable": True}
    )
    pretrained_vae_model_name_or_path: str | None = field(
        default=None, metadata={"help": "VAE whose latents to learn; a cache brings its own. Default: learn pixels."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, given in ((f"model {STORED}", self.model == STORED), ("new_classes", self.new_classes)):
            if given and self.init_from is None:
                raise ValueError(f"{name} needs init_from.")

    def config(self, **overrides: Any) -> dict[str, Any]:
        """Return the model's config: the preset's, the arguments that are given over it, and `overrides` over both.

        With model `stored`, the folder `init_from` takes the place of a preset. A decay that is added to a stored
        model without one starts as none.

        Raises:
            ValueError: If the preset or a key is unknown, or `model_overrides` is not a JSON object.
        """
        further = json_object(self.model_overrides, "model_overrides")
        derived = sorted({"in_channels", "num_classes", "sample_size", *overrides} & set(further))
        if derived:
            raise ValueError(
                f"model_overrides: {', '.join(derived)} follow from the data set and resolution, or the objective."
            )
        own = {key: getattr(self, key) for key in CONFIG_KEYS if getattr(self, key) is not None}
        if self.qk_norm == "none":
            own["qk_norm"] = None
        preset, stored = self.model, {} if self.init_from is None else stored_config(self.init_from)
        if self.model == STORED:
            preset, own = next(iter(PRESETS)), {**stored, **own}
        spatial_decay = {**own, **further}["spatial_decay"]
        if adds_decay(stored, spatial_decay) and spatial_decay != "fixed":  # which has nothing to learn
            own["decay_start"] = "none"
        return SDTTransformer2DModel.preset_config(preset, **{**own, **further, **overrides})

    def build(self, class_names: Sequence[str] = (), **overrides: Any) -> SDTTransformer2DModel:
        """Build the model of `config(**overrides)`, randomly initialized or with the weights of `init_from`.

        Args:
            class_names: Names of the classes, for `new_classes`.
            **overrides: See `config`.

        Raises:
            ValueError: If the config, or the folder of `init_from`, does not make such a model.
        """
        config = self.config(**overrides)
        try:
            model = SDTTransformer2DModel(**config)
        except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError) as error:
            if self.model_overrides is None:
                raise
            raise ValueError(f"model_overrides {self.model_overrides:.99} make no model: {one_line(error)}") from error
        if self.init_from is not None:
            load_weights(model, self.init_from, self.new_classes, class_names)
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model
