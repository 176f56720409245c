"""SDTTransformer2DModel: a class-conditional diffusion transformer with spatial decay attention."""

import functools
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..attention_processor import AttentionBackendMixin
from ..blocks import SDTBlock, modulate
from ..norms import build_norm
from ..utils.reading import CHECKSUMS_FILE, read_json, shortened, verify_checksums, write_checksums
from .caching import SDTCacheMixin
from .config_ranges import check_config, sides
from .embeddings import SDTPatchEmbed, TimestepClassEmbedding
from .grid_scaling import GridScalingMixin
from .initialization import draw_seed, initialize_meta, initialize_weights
from .model_input import check_input
from .model_output import SDTTransformer2DModelOutput, check_blocks, flow_of_clean
from .presets import PRESETS
from .token_route import TokenRoute, check_route
from .wide_head import WideHead

#: Where diffusers warns of weights that are missing or left over.
LOADING_LOGGER = logging.getLogger("diffusers.models.modeling_utils")
CONFIG_FILE = "config.json"
#: Config keys that are options of all blocks.
BLOCK_KEYS = (
    *("num_attention_heads", "mlp_ratio", "activation_fn", "dropout", "gate_conditioning", "norm_eps", "norm_type"),
    *("spatial_decay", "decomposed", "decay_initial_value", "decay_heads_range", "decay_start", "qk_norm"),
    "local_position_kernel_size",
)


class SDTTransformer2DModel(
    AttentionBackendMixin,
    GridScalingMixin,
    ModelMixin,
    AttentionMixin,
    ConfigMixin,
    PeftAdapterMixin,
    FromOriginalModelMixin,
    SDTCacheMixin,
):
    """A diffusion transformer (DiT) whose attention decays with distance on the patch grid (SDT).

    Numerics, initialization and defaults are those of facebookresearch/DiT; `spatial_decay="none"` is a plain DiT.

    Args:
        num_attention_heads: Number of heads.
        attention_head_dim: Width of a head; the model's width is their product.
        in_channels: Channels of the (latent) image.
        out_channels: Channels of the prediction; `in_channels` by default, twice that for a learned variance.
        num_layers: Number of blocks.
        sample_size: Height and width of the (latent) image it is trained on, one number if they are equal.
        patch_size: Side of a patch.
        num_classes: Number of classes; the null class of guidance has the label `num_classes`.
        mlp_ratio: Hidden width of the MLP in units of the width.
        activation_fn: Activation of the MLP, in diffusers' names.
        dropout: Dropout after attention and in the MLP.
        class_dropout_prob: Probability that training replaces a label by the null class.
        spatial_decay: How attention decays, one of `sdt_diffusion.attention.SPATIAL_DECAY_VARIANTS`.
        decomposed: Attend along rows, then along columns, for grids too large for full attention.
        gate_conditioning: Whether timestep and class condition the gates of the decay, besides the tokens.
        decay_initial_value: Exponent a of the most near-sighted head at the start; it decays by log(1 - 2^-a) a patch.
        decay_heads_range: Span of the exponents over the heads.
        decay_start: One of `sdt_diffusion.attention.gate.DECAY_STARTS`: "rmt", or "none" to start as plain attention.
        qk_norm: `None` or "rms_norm".
        rotary: Whether queries and keys carry a 2D rotary embedding (half of each head for rows, half for columns).
        local_position_kernel_size: Kernel of the local position encoding on the values; 0 for none.
        frequency_embedding_size: Number of sines and cosines of the timestep.
        timestep_scale: Factor of the timesteps before their sines; SiT's models have 1/1000.
        timestep_frequency_shift: 1 for the frequencies of diffusers' DiT, 0 for those of facebookresearch/DiT.
        norm_eps: Epsilon of the norms.
        norm_type: One of `sdt_diffusion.norms.NORM_TYPES`: "layer" or "rms".
        pos_embed_scaling: Position embedding on other grids, one of `POSITION_SCALINGS`; see `set_grid_scaling`.
        rotary_scaling: The same for the rotary embedding.
        decay_distance_scaling: Whether the decay measures distances on other grids in patches of the trained grid.
        adaln: One of `sdt_diffusion.blocks.ADALN_KINDS`: "full", "single" or "low_rank".
        adaln_rank: Rank of the matrices of "low_rank".
        num_registers: Learned tokens before the patches, without positions and without decay; dropped at the end.
        position_embedding: "sincos" or "none".
        long_skips: Whether blocks of the second half also see the tokens of the first's, as in U-ViT.
        network_output: "prediction", or "clean" if the last layer makes the clean image, of which the model returns
            the flow; see `flow_of_clean`.
        interval_conditioning: Whether the model also knows the timestep at which a step ends, as MeanFlow needs.
        head_layers: Number of blocks of a `WideHead`, for latents of many channels; 0 for none.
        head_width: Its width.

    Raises:
        ValueError: If a number is out of its range (`RANGES`), sizes do not divide, an option is unknown, or options
            contradict each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SDTBlock", "SDTPatchEmbed"]  # noqa: RUF012 (diffusers' names and forms, here and below)
    _repeated_blocks = ["SDTBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "gate", "time_class_embed", "modulation"]  # noqa: RUF012
    _keep_in_fp32_modules = ["gate"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 12,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        activation_fn: str = "gelu-approximate",
        dropout: float = 0.0,
        class_dropout_prob: float = 0.1,
        spatial_decay: str = "context",
        decomposed: bool = False,
        gate_conditioning: bool = True,
        decay_initial_value: float = 2.0,
        decay_heads_range: float = 6.0,
        decay_start: str = "rmt",
        qk_norm: str | None = None,
        rotary: bool = False,
        local_position_kernel_size: int = 0,
        frequency_embedding_size: int = 256,
        timestep_scale: float = 1.0,
        timestep_frequency_shift: float = 0.0,
        norm_eps: float = 1e-6,
        norm_type: str = "layer",
        pos_embed_scaling: str = "interpolate",
        rotary_scaling: str = "none",
        decay_distance_scaling: bool = False,
        adaln: str = "full",
        adaln_rank: int = 64,
        num_registers: int = 0,
        position_embedding: str = "sincos",
        long_skips: bool = False,
        network_output: str = "prediction",
        interval_conditioning: bool = False,
        head_layers: int = 0,
        head_width: int = 2048,
    ):
        values = dict(locals())
        super().__init__()
        seed = draw_seed()  # before the layers, whose number of draws depends on the options
        check_config(values)
        height, width = sides(sample_size)
        dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        self.gradient_checkpointing = False

        self.pos_embed = SDTPatchEmbed(
            *(in_channels, dim, patch_size, (height // patch_size, width // patch_size)),
            *(position_embedding == "sincos", num_registers),
        )
        self.time_class_embed = TimestepClassEmbedding(
            *(dim, num_classes, class_dropout_prob, frequency_embedding_size),
            *(timestep_scale, timestep_frequency_shift, interval_conditioning),
        )
        self.shared_modulation = None if adaln == "full" else nn.Linear(dim, 6 * dim)
        block_options: dict[str, Any] = {name: values[name] for name in BLOCK_KEYS}
        per_block: dict[str, Any] = {
            "attention_head_dim": attention_head_dim,
            "conditioning_dim": dim,
            "num_registers": num_registers,
        }
        per_block |= {"adaln": adaln, "adaln_rank": adaln_rank}
        self.transformer_blocks = nn.ModuleList(SDTBlock(dim, **block_options, **per_block) for _ in range(num_layers))
        num_skips = (num_layers - 1) // 2 if long_skips else 0  # the middle block, or the middle two, have none
        self.skip_projections = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(num_skips)) if num_skips else None
        self.wide_head, last_dim = None, dim
        if head_layers:
            grid_size, last_dim = self.pos_embed.grid_size, head_width
            self.wide_head = WideHead(
                in_channels, dim, head_width, patch_size, grid_size, head_layers, **block_options
            )
        self.norm_out = build_norm(norm_type, last_dim, norm_eps, affine=False)
        self.proj_out_1 = nn.Linear(last_dim, 2 * last_dim)
        self.proj_out_2 = nn.Linear(last_dim, patch_size**2 * self.out_channels)
        initialize_weights(self, seed)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SDTTransformer2DModel":
        """Build a randomly initialized model of a named size.

        Args:
            name: A key of `PRESETS`, such as "SDT-XL/2".
            **overrides: Config values in place of the preset's.

        Raises:
            ValueError: If the preset or a config key is unknown; the message lists the known ones.
        """
        return cls(**cls.preset_config(name, **overrides))

    @classmethod
    def preset_config(cls, name: str, **overrides) -> dict[str, Any]:
        """Return the config from which `from_preset` builds a model; same arguments and errors."""
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
        known = {key: p.default for key, p in inspect.signature(cls.__init__).parameters.items() if key != "self"}
        unknown = sorted(set(overrides) - set(known))
        if unknown:
            raise ValueError(f"Unknown config key(s) {', '.join(unknown)} for {name}; known keys: {', '.join(known)}.")
        return {**known, **PRESETS[name], **overrides}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, output_loading_info: bool = False, **kwargs):
        """Load a model as diffusers does, but refuse one that is not whole, which diffusers fills with random values.

        Args:
            pretrained_model_name_or_path: Folder or Hub name; the checksums of a folder are compared first.
            output_loading_info: Return the names that are missing and unexpected too, and do not refuse the model.
            **kwargs: See diffusers. With `ignore_mismatched_sizes=True` and config values such as `num_classes`,
                weights of other shapes than the stored ones are initialized. `low_cpu_mem_usage` makes no difference.

        Raises:
            ValueError: If weights are missing, left over, or changed since they were saved; names them.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        verify_checksums(folder)
        if (folder / CONFIG_FILE).is_file():
            read_json(folder / CONFIG_FILE)  # diffusers takes a text in it for the name of another model
        kwargs.pop("low_cpu_mem_usage", None)  # diffusers loads models with parts in fp32 in one way only
        level = LOADING_LOGGER.level
        LOADING_LOGGER.setLevel(level if output_loading_info else logging.ERROR)  # what it warns of is refused below
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        finally:
            LOADING_LOGGER.setLevel(level)
        names = {"has no": info.get("missing_keys"), "has unknown": info.get("unexpected_keys")}
        wrong = [f"{verb} {shortened(sorted(found))}" for verb, found in names.items() if found]
        if wrong and not output_loading_info:
            where = f"{pretrained_model_name_or_path} is not a whole {cls.__name__}"
            raise ValueError(f"{where}: it {' and '.join(wrong)}.")
        initialize_meta(model)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict=None, **kwargs):
        """Refuse: diffusers' loader of single files knows none of DiT's kinds. The message says what to do instead.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"from_single_file does not load {cls.__name__}. Convert the file once, by `sdt-diffusion convert FILE "
            "FOLDER`, and load the folder by SDTPipeline.from_pretrained(FOLDER)."
        )

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at its arguments
    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """Save the model as diffusers does, with the checksums of its weights."""
        if is_main_process:
            (Path(save_directory) / CHECKSUMS_FILE).unlink(missing_ok=True)  # those of what is replaced
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_checksums(Path(save_directory))

    def forward_features(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None = None,
        decay_scale: torch.Tensor | None = None,
        end_timestep: torch.Tensor | None = None,
        block_outputs: Sequence[int] = (),
        route: TokenRoute | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Run all blocks; same arguments and errors as `forward`.

        Returns:
            The patches after the last block, shape (batch, tokens, width), the conditioning, shape (batch, width), and
            the patches after each block of `block_outputs`.
        """
        height, width = check_input(self.config, hidden_states, class_labels)
        check_blocks(block_outputs, len(self.transformer_blocks))
        grid_size = (height // self.config.patch_size, width // self.config.patch_size)
        batch_size, device, registers = len(hidden_states), hidden_states.device, self.config.num_registers
        timestep = timestep.expand(batch_size)  # (B,)
        end_timestep = None if end_timestep is None else end_timestep.expand(batch_size)  # (B,)
        decay_scale = self._factors_of_decay(decay_scale, batch_size, grid_size, device)  # (B, h) or (B, 1)

        hidden_states = self.pos_embed(hidden_states, self.config.pos_embed_scaling)  # (B, R+N, D), N = H/p * W/p
        conditioning = self.time_class_embed(
            timestep, class_labels, hidden_states.dtype, force_drop_ids, end_timestep
        )  # (B, D)
        modulation = None if self.shared_modulation is None else self.shared_modulation(conditioning)  # (B, 6*D)
        image_rotary_emb = self._rotary_embedding(grid_size, device)  # each (R+N, d)
        inputs = (grid_size, conditioning, image_rotary_emb, decay_scale, modulation, None)
        if route is not None:
            check_route(route, self.config, grid_size, block_outputs)
        num_layers, skips, kept = self.config.num_layers, list(self.skip_projections or ()), {}
        for i, block in enumerate(self.transformer_blocks):
            if route is not None and i == route.start:
                before, all_inputs = hidden_states, inputs
                hidden_states, inputs = route.take(before, registers), route.inputs(inputs, registers)  # (B, R+n, D)
            source = num_layers - 1 - i  # the block whose tokens a long skip brings here
            if source < len(skips):
                hidden_states = skips[source](torch.cat([hidden_states, kept[source]], dim=-1))  # (B, R+N, D)
            hidden_states = self._run_block(block, hidden_states, *inputs)  # (B, R+N, D)
            if route is not None and i == route.end - 1:
                hidden_states, inputs = route.put_back(hidden_states, before, registers), all_inputs  # (B, R+N, D)
            if i < len(skips) or i in block_outputs:
                kept[i] = hidden_states
        outputs = tuple(kept[i][:, registers:] for i in block_outputs)  # each (B, N, D)
        return hidden_states[:, registers:], conditioning, outputs

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
        force_drop_ids: torch.Tensor | None = None,
        decay_scale: torch.Tensor | None = None,
        end_timestep: torch.Tensor | None = None,
        block_outputs: Sequence[int] = (),
        route: TokenRoute | None = None,
    ) -> SDTTransformer2DModelOutput | tuple[Any, ...]:
        """Predict noise, velocity or flow from a noisy (latent) image.

        Args:
            hidden_states: Shape (batch, in_channels, height, width); the sides need not be the trained ones.
            timestep: Shape (batch,) or a scalar, 0 to 1000: steps of a DDPM schedule, or 1000 sigma of a flow.
            class_labels: Labels 0 to num_classes - 1, or the null class `num_classes`, shape (batch,).
            return_dict: Whether to return a `SDTTransformer2DModelOutput` instead of a tuple.
            force_drop_ids: Which labels the null class replaces, shape (batch,), as in facebookresearch/DiT; by
                default training draws them with probability `class_dropout_prob`.
            decay_scale: Factor of the spatial decay, shape (batch,) or (batch, heads), for `SDTGuidance`; 1 by
                default.
            end_timestep: Timestep at which the step ends that the flow is averaged over, shape (batch,) or a scalar,
                for a model with `interval_conditioning`; `timestep` by default, where it is the flow itself.
            block_outputs: Blocks, from 0, whose output to return as well.
            route: Which patches take part in all blocks, in training; all of them by default.

        Returns:
            The prediction, shape (batch, out_channels, height, width), and, if there are `block_outputs`, the patches
            after those blocks, a tuple of tensors of shape (batch, patches, width).

        Raises:
            ValueError: If the channels, sides, labels, factors of the decay, `end_timestep`, blocks or route do not
                fit the model.
        """
        image, patch_size = hidden_states, self.config.patch_size
        height, width = image.shape[-2:]
        hidden_states, conditioning, outputs = self.forward_features(
            image, timestep, class_labels, force_drop_ids, decay_scale, end_timestep, block_outputs, route
        )
        grid_size = (height // patch_size, width // patch_size)
        conditioning = conditioning.unsqueeze(1)  # (B, 1, D)
        if self.wide_head is not None:
            rotary = self._rotary_embedding(grid_size, image.device, wide_head=True)  # each (N, d)
            decay_scale = self._factors_of_decay(decay_scale, len(image), grid_size, image.device)
            hidden_states, conditioning = self.wide_head(
                image, hidden_states, conditioning, self._run_block, grid_size, rotary, decay_scale
            )  # each (B, N, D), D = head_width
        shift, scale = self.proj_out_1(conditioning).chunk(2, dim=-1)  # each (B, 1 or N, D)
        hidden_states = self.proj_out_2(modulate(self.norm_out(hidden_states), shift, scale))  # (B, N, p*p*C)
        patches = hidden_states.unflatten(1, grid_size)  # (B, H/p, W/p, p*p*C)
        patches = patches.unflatten(-1, (patch_size, patch_size, self.out_channels))  # (B, H/p, W/p, p, p, C)
        sample = patches.permute(0, 5, 1, 3, 2, 4)  # (B, C, H/p, p, W/p, p)
        sample = sample.reshape(-1, self.out_channels, height, width)  # (B, C, H, W)
        if self.config.network_output == "clean":
            sample = flow_of_clean(sample, image, timestep)
        if not return_dict:
            return (sample, outputs) if block_outputs else (sample,)
        return SDTTransformer2DModelOutput(sample=sample, block_outputs=outputs if block_outputs else None)

    def _run_block(self, block, *inputs):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)
