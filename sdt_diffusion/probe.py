"""Features of a trained generative transformer, and a classifier on them: config, backbone and models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import SchedulerMixin
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)

from .data.decoding import IMAGE_MODES
from .sdt import SDTTransformer2DModel
from .sdt.embeddings import SDTPatchEmbed, position_embedding
from .sdt.loading import open_pipeline, open_transformer
from .sdt.model_output import check_blocks
from .sdt.schedulers import DIT_SCHEDULE, noise_scales
from .sdt.vae import VAELayout, encode_pixels, vae_spatial_scale
from .sdt_h.modeling_sdt_h import ImagePreTrainedModel
from .utils.ranges import LARGEST_SEED, Range, check_value

#: Values that the numbers of a config may have; those of int type are whole.
CONFIG_RANGES: dict[str, tuple[type, Range]] = {
    "block": (int, Range(0, 999)),
    "timestep": (float, Range(0, 100_000)),
    "signal_scale": (float, Range(0, 1)),
    "noise_scale": (float, Range(0, 1)),
    "noise_seed": (int, Range(0, LARGEST_SEED)),
    "num_channels": (int, Range(1, 4096)),
}


class SDTClassifierConfig(PretrainedConfig):
    """Config of `SDTForImageClassification` and `SDTModel`.

    Args:
        transformer: Config of the whole `SDTTransformer2DModel`.
        block: Block whose tokens are the features; the blocks above it are left out.
        timestep: Timestep of the noise in the transformer's input.
        signal_scale: Factor of the image.
        noise_scale: Factor of the noise that is added to it.
        noise_seed: Seed of the noise in evaluation.
        vae: Config of the VAE, with the name of its class as `_class_name`; `None` for pixels.
        freeze_backbone: Whether the transformer is frozen in training.
        num_channels: Channels of the images.
        **kwargs: Arguments of every config, such as `id2label`.
    """

    model_type = "sdt_classifier"

    def __init__(
        self,
        transformer: dict[str, Any] | None = None,
        block: int = 0,
        timestep: float = 0.0,
        signal_scale: float = 1.0,
        noise_scale: float = 0.0,
        noise_seed: int = 0,
        vae: dict[str, Any] | None = None,
        freeze_backbone: bool = True,
        num_channels: int = 3,
        **kwargs,
    ):
        self.transformer, self.block, self.vae = transformer or {}, block, vae
        self.timestep, self.signal_scale, self.noise_scale = timestep, signal_scale, noise_scale
        self.noise_seed, self.freeze_backbone, self.num_channels = noise_seed, freeze_backbone, num_channels
        super().__init__(**kwargs)


@dataclass
class Backbone:
    """A trained transformer, with the scheduler and the VAE that it was trained with.

    Args:
        transformer: The transformer.
        scheduler: The scheduler that is saved with it, or one of the same noise levels.
        vae: The VAE; `None` for pixels.
    """

    transformer: SDTTransformer2DModel
    scheduler: SchedulerMixin
    vae: nn.Module | None = None

    @property
    def resolution(self) -> int:
        """Side of the images that it was trained on, in pixels.

        Raises:
            ValueError: If they are not square.
        """
        size = self.transformer.config.sample_size
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) > 1:
            raise ValueError(
                f"The transformer was trained on images of sample_size {size}, but a classifier needs square ones."
            )
        return sides.pop() * vae_spatial_scale(self.vae)

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self.transformer.config.in_channels if self.vae is None else VAELayout.of(self.vae).image_channels

    @property
    def image_mode(self) -> str:
        """Mode of the images, "L" or "RGB".

        Raises:
            ValueError: If they are neither gray nor in color.
        """
        if self.num_channels not in IMAGE_MODES:
            raise ValueError(
                f"The transformer works in {self.num_channels} channels, which are not pixels: give the folder of the "
                "pipeline, with its VAE."
            )
        return IMAGE_MODES[self.num_channels]


def load_backbone(folder: str, objective: str | None = None) -> Backbone:
    """Load a trained pipeline or transformer.

    Args:
        folder: Folder that `save_pretrained` wrote.
        objective: "flow" (the default) or "ddpm" (DiT's schedule), for a transformer without a pipeline.

    Raises:
        ValueError: If a pipeline is given an objective, or the model is damaged, or of another kind.
    """
    if (Path(folder) / "model_index.json").exists():
        if objective is not None:
            raise ValueError(
                f"objective {objective!r} cannot be given for the pipeline {folder}: its scheduler decides that."
            )
        pipe = open_pipeline(folder)
        return Backbone(pipe.transformer, pipe.scheduler, pipe.vae)
    scheduler = DDPMScheduler(**DIT_SCHEDULE) if objective == "ddpm" else FlowMatchEulerDiscreteScheduler()
    return Backbone(open_transformer(folder), scheduler)


class SDTPreTrainedModel(ImagePreTrainedModel):
    """The tokens of one block of a generative transformer, and their normalized mean over the image.

    The image (or its latent, the mode of the VAE's posterior) gets the noise of one timestep, and the null class for a
    label. Training draws the noise. Evaluation adds the same noise, drawn once from `noise_seed`, to every image, so
    that a result depends on the image alone. A batch norm without parameters brings the features to one scale for a
    linear layer, as in the linear probes of "Masked Autoencoders" (He et al. 2022).
    """

    config_class = SDTClassifierConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["SDTBlock"]  # noqa: RUF012 (transformers' names and forms, here and below)
    _keep_in_fp32_modules_strict = ["gate"]  # noqa: RUF012

    def __init__(self, config: SDTClassifierConfig):
        super().__init__(config)
        for name, (kind, allowed) in CONFIG_RANGES.items():
            check_value(name, getattr(config, name), (kind,), allowed)
        if not isinstance(config.transformer, dict) or not isinstance(config.vae, (dict, type(None))):
            raise ValueError("transformer and vae must be configs.")
        self.vae: nn.Module | None = None
        if config.vae is not None:
            self.vae = _vae_class(config.vae.get("_class_name")).from_config(config.vae)
        # Long skips pair blocks by the depth of the whole model.
        depth = {} if config.transformer.get("long_skips") else {"num_layers": config.block + 1}
        self.transformer = SDTTransformer2DModel.from_config({**config.transformer, **depth})
        check_blocks([config.block], len(self.transformer.transformer_blocks))
        del self.transformer.transformer_blocks[config.block + 1 :]
        # A classifier does not need what predicts noise.
        self.transformer.wide_head = None
        self.transformer.proj_out_1 = self.transformer.proj_out_2 = nn.Identity()
        self.dim = self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim
        self.norm = nn.BatchNorm1d(self.dim, affine=False, eps=1e-6)

    def train(self, mode: bool = True) -> "SDTPreTrainedModel":
        """Set the mode; frozen parts stay in evaluation mode, without dropout, and take no gradients."""
        super().train(mode)
        for module, frozen in ((self.vae, True), (self.transformer, self.config.freeze_backbone)):
            if module is not None and frozen:
                module.eval().requires_grad_(False)  # here too, as weights that transformers loads take gradients
        return self

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that sort parameters by depth, for layer-wise learning rates, in timm's form."""
        return {
            "stem": r"^transformer\.(?:pos_embed|time_class_embed)",
            "blocks": r"^transformer\.transformer_blocks\.(\d+)",
        }

    def no_weight_decay(self) -> set[str]:
        """Return no names: timm already excludes one-dimensional parameters."""
        return set()

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the tokens of the block.

        Args:
            pixel_values: Images in -1 to 1, shape (batch, num_channels, height, width).

        Returns:
            Tokens, shape (batch, tokens, width).
        """
        clean = pixel_values if self.vae is None else encode_pixels(self.vae, pixel_values)  # (B, C, H, W)
        if self.training:
            noise = torch.randn_like(clean)
        else:
            generator = torch.Generator().manual_seed(self.config.noise_seed)
            noise = torch.randn(clean.shape[1:], generator=generator, device="cpu").to(clean)  # (C, H, W)
        noised = self.config.signal_scale * clean + self.config.noise_scale * noise
        timestep = torch.full(clean.shape[:1], self.config.timestep, device=clean.device)  # (B,)
        null_class = torch.full(clean.shape[:1], self.transformer.config.num_classes, device=clean.device)  # (B,)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_backbone):
            return self.transformer.forward_features(noised.to(self.transformer.dtype), timestep, null_class)[0]

    def forward_pooling(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, tokens, width) to their normalized mean (batch, width)."""
        return self.norm(tokens.mean(dim=1))

    def _init_weights(self, module: nn.Module) -> None:
        # The backbone is loaded or has initialized itself, except for its fixed embedding, which no file holds.
        if isinstance(module, SDTPatchEmbed):
            embedding = position_embedding(module.proj.out_channels, module.grid_size, module.grid_size, "cpu")
            module.pos_embed = embedding.to(module.pos_embed)
        elif module is self.norm and not getattr(module.running_mean, "_is_hf_initialized", False):
            module.reset_running_stats()


class SDTModel(SDTPreTrainedModel):
    """Features of a generative transformer without a classifier, as `AutoModel` returns it."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012

    def __init__(self, config: SDTClassifierConfig):
        super().__init__(config)
        self.post_init()
        self.train()  # freezes the backbone

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple[torch.Tensor, ...]:
        """Compute features of images.

        Args:
            pixel_values: Images in -1 to 1, shape (batch, num_channels, height, width).
            output_hidden_states: Whether to return the tokens as `hidden_states` too.
            return_dict: Whether to return a `BaseModelOutputWithPoolingAndNoAttention` instead of a tuple.

        Returns:
            The tokens of the block as `last_hidden_state`, shape (batch, tokens, width), and their normalized mean as
            `pooler_output`, shape (batch, width).

        Raises:
            ValueError: If the images do not fit the transformer.
        """
        tokens = self.forward_features(pixel_values)
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=tokens, pooler_output=self.forward_pooling(tokens)
        )
        return self.build_output(output, (tokens,), output_hidden_states, return_dict)


class SDTForImageClassification(SDTPreTrainedModel):
    """A linear classifier on features of a transformer: generative, a linear probe with `freeze_backbone`, or new."""

    def __init__(self, config: SDTClassifierConfig):
        super().__init__(config)
        self.head = nn.Linear(self.dim, config.num_labels)
        self.post_init()
        self.train()  # freezes the backbone

    @classmethod
    def from_preset(
        cls, name: str, id2label: dict[int, str], label2id: dict[str, int], **overrides: Any
    ) -> "SDTForImageClassification":
        """Build a classifier to train from scratch: a transformer without convolutions, and a head on its last block.

        It sees images without noise, at timestep 0 and with the null class, which together are a learned constant.

        Args:
            name: A preset of `SDTTransformer2DModel`, such as "SDT-S/4+".
            id2label: Name of each class.
            label2id: Label of each name.
            **overrides: Config values of the transformer in place of the preset's.

        Raises:
            ValueError: If the preset or a config key is unknown.
        """
        # Conditioned by a constant, a gate would only have another bias.
        own = {"num_classes": len(id2label), "gate_conditioning": False, **overrides}
        transformer = SDTTransformer2DModel.preset_config(name, **own)
        block, num_channels = transformer["num_layers"] - 1, transformer["in_channels"]
        labels: dict[str, Any] = {"id2label": id2label, "label2id": label2id, "num_channels": num_channels}
        return cls(SDTClassifierConfig(transformer, block, freeze_backbone=False, **labels))

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        block: int | None = None,
        timestep: float = 200,
        freeze_backbone: bool = True,
        **config: Any,
    ) -> "SDTForImageClassification":
        """Put a new head on a trained transformer, whose weights are copied.

        Args:
            backbone: The transformer, with its scheduler and VAE.
            block: Block whose tokens are the features, from 0; the middle one by default.
            timestep: Noise level, see `noise_scales`.
            freeze_backbone: Whether the transformer is frozen in training.
            **config: Further values of the config, such as `id2label`.

        Raises:
            ValueError: If there is no such block or timestep.
        """
        transformer, vae = backbone.transformer, backbone.vae
        num_layers = transformer.config.num_layers
        block = num_layers // 2 if block is None else block
        if not 0 <= block < num_layers:
            raise ValueError(f"block must lie in 0..{num_layers - 1} for this transformer, not {block}.")
        signal_scale, noise_scale = noise_scales(backbone.scheduler, timestep)
        model = cls(
            SDTClassifierConfig(
                transformer=_json_config(transformer),
                block=block,
                timestep=timestep,
                signal_scale=signal_scale,
                noise_scale=noise_scale,
                vae=None if vae is None else {**_json_config(vae), "_class_name": type(vae).__name__},
                freeze_backbone=freeze_backbone,
                num_channels=backbone.num_channels,
                **config,
            )
        )
        trained = transformer.state_dict()
        model.transformer.load_state_dict({name: trained[name] for name in model.transformer.state_dict()})
        if vae is not None and model.vae is not None:
            model.vae.load_state_dict(vae.state_dict())
        return model

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[torch.Tensor, ...]:
        """Classify images.

        Args:
            pixel_values: Images in -1 to 1, shape (batch, num_channels, height, width).
            labels: Class of each image, 0 to num_labels - 1, shape (batch,), for the loss.
            output_hidden_states: Whether to return the tokens that the head sees, of shape (batch, tokens, width).
            return_dict: Whether to return an `ImageClassifierOutputWithNoAttention` instead of a tuple.

        Returns:
            The loss (given labels), the logits of shape (batch, num_labels), and the hidden states (if asked for).

        Raises:
            ValueError: If the images do not fit the transformer, or labels do not fit the model.
        """
        if labels is not None:
            self.check_labels(labels, len(pixel_values))
        tokens = self.forward_features(pixel_values)
        logits = self.head(self.forward_pooling(tokens))  # (B, num_labels)
        return self.build_classifier_output(logits, labels, (tokens,), output_hidden_states, return_dict)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.head and not getattr(module.weight, "_is_hf_initialized", False):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def _vae_class(name: Any) -> Any:
    """Return diffusers' class of a VAE."""
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin) and hasattr(found, "decode")):
        raise ValueError(f"vae must be a VAE of diffusers, not {name!r}.")
    return found


def _json_config(module: nn.Module) -> dict[str, Any]:
    """Return the config of a diffusers model in the types of JSON, without diffusers' own entries."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in module.config.items()
        if not key.startswith("_")
    }
