"""SDTHNetwork, the hierarchical classifier SDT-H that the models for transformers and timm wrap, and its presets.

Sources: "Learning Spatial Decay for Vision Transformers" (SDT, arXiv 2508.09525), whose classifier is the backbone of
"RMT: Retentive Networks Meet Vision Transformers" (CVPR 2024) with context-aware gates in place of RMT's fixed decay.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerScale
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..attention import ContextAwareGate
from ..attention.gate import MAX_EXPONENT
from ..blocks import SDTBlock
from ..utils.ranges import Range, check_number, check_value

#: Preset -> config. Parameters (1,000 classes) and 2^30 multiply-adds (224x224) as counted by tests and benchmarks;
#: top-1 of ImageNet-1K as the paper reports it after 300 epochs, not reproduced here.
PRESETS: dict[str, dict[str, Any]] = {
    "SDT-H-T": {  # 14.4M, 2.46, 82.7%
        "hidden_sizes": (64, 128, 256, 512),
        "depths": (2, 2, 8, 2),
        "num_attention_heads": (4, 4, 8, 16),
        "mlp_ratios": (3, 3, 3, 3),
        "decay_heads_ranges": (4, 4, 6, 6),
        "layer_scale_init_values": (None, None, None, None),
        "drop_path_rate": 0.1,
    },
    "SDT-H-S": {  # 27.0M, 4.74, 84.2%
        "hidden_sizes": (64, 128, 256, 512),
        "depths": (3, 4, 18, 4),
        "num_attention_heads": (4, 4, 8, 16),
        "mlp_ratios": (4, 4, 3, 3),
        "decay_heads_ranges": (4, 4, 6, 6),
        "layer_scale_init_values": (None, None, None, None),
        "drop_path_rate": 0.15,
    },
    "SDT-H-B": {  # 54.3M, 10.18, 85.1%
        "hidden_sizes": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "num_attention_heads": (5, 5, 10, 16),
        "mlp_ratios": (4, 4, 3, 3),
        "decay_heads_ranges": (5, 5, 6, 6),
        "layer_scale_init_values": (None, None, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    },
    "SDT-H-digits": {  # 8x8 gray pixels, 10 classes: scikit-learn's digits. The stem keeps the image's own grid.
        "hidden_sizes": (32, 64),
        "depths": (2, 2),
        "num_attention_heads": (2, 4),
        "mlp_ratios": (3, 3),
        "decomposed": (False, False),
        "decay_heads_ranges": (4, 6),
        "layer_scale_init_values": (None, None),
        "drop_path_rate": 0.1,
        "stem_strides": (1, 1),
        "head_hidden_size": 256,
    },
}

#: Values that the numbers of a network may have, item by item; those of int type are whole.
RANGES: dict[str, tuple[type, Range]] = {
    "num_channels": (int, Range(1, 4096)),
    "num_labels": (int, Range(0, 10_000_000)),
    "hidden_sizes": (int, Range(2, 16_384)),
    "depths": (int, Range(1, 1000)),
    "num_attention_heads": (int, Range(1, 1024)),
    "mlp_ratios": (float, Range(0, 64, with_least=False)),
    "decay_initial_value": (float, Range(-MAX_EXPONENT, MAX_EXPONENT)),
    "decay_heads_ranges": (float, Range(-MAX_EXPONENT, MAX_EXPONENT)),
    "layer_scale_init_values": (float, Range(-1000, 1000)),
    "drop_path_rate": (float, Range(0, 1, with_most=False)),
    "head_hidden_size": (int, Range(1, 65_536)),
    "stem_strides": (int, Range(1, 16)),
    "dropout": (float, Range(0, 1, with_most=False)),
    "layer_norm_eps": (float, Range(0, 1)),
    "initializer_range": (float, Range(0, 10)),
}
#: A config of more parameters is a mistake, which would only show when memory is asked for.
MAX_PARAMETERS = 1e11

#: Kernel sizes of RMT's depth-wise convolutions.
BLOCK_KERNEL_SIZES = {"conditional_position_kernel_size": 3, "local_position_kernel_size": 5, "mlp_kernel_size": 3}


def preset_config(name: str, **overrides) -> dict[str, Any]:
    """Return the arguments of `SDTHNetwork` for a named size.

    Args:
        name: A key of `PRESETS`, such as "SDT-H-T".
        **overrides: Arguments in place of the preset's.

    Raises:
        ValueError: If the preset or a key is unknown; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
    known = list(inspect.signature(SDTHNetwork).parameters)
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"Unknown config key(s) {', '.join(unknown)} for {name}; known keys: {', '.join(known)}.")
    return {**PRESETS[name], **overrides}


def raster_rotary_embedding(
    head_dim: int, tokens: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute RMT's rotary embedding over the raster index n = y * W + x, not over rows and columns.

    Neighboring channels turn as a pair by n * theta_m, theta_m = 10000^(-m / (head_dim / 2 - 1)), so that the last
    frequency is 1/10000 itself.

    Returns:
        Cosines and sines, each of shape (tokens, head_dim), in fp32.
    """
    theta = 10000 ** -torch.linspace(0, 1, head_dim // 2, device=device)
    angle = torch.arange(tokens, device=device)[:, None] * theta.repeat_interleave(2)
    return angle.cos(), angle.sin()


def conv_norm(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    """Build a 3x3 convolution and its batch norm; with stride 2 it halves the sides, rounding up."""
    return [nn.Conv2d(in_channels, out_channels, 3, stride, padding=1), nn.BatchNorm2d(out_channels)]


def check_images(pixel_values: torch.Tensor, num_channels: int) -> None:
    """Refuse tensors that are not batches of images with `num_channels` channels.

    Raises:
        ValueError: If the images have a wrong shape.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"The model takes images of shape (batch, {num_channels}, height, width), not {tuple(pixel_values.shape)}."
        )


class SDTHStage(nn.Module):
    """Blocks on one grid, after the convolution that halves it (except in the first stage).

    Args:
        in_channels: Channels of the finer grid, or `None` for the first stage.
        dim: Channels of this stage.
        drop_paths: Drop path probability of each block; one block is built for each.
        num_attention_heads: Heads of each block.
        **block_kwargs: Further options of `SDTBlock`.
    """

    def __init__(
        self, in_channels: int | None, dim: int, drop_paths: Sequence[float], num_attention_heads: int, **block_kwargs
    ):
        super().__init__()
        self.dim, self.head_dim = dim, dim // num_attention_heads
        self.gradient_checkpointing = False
        self.downsample = nn.Identity() if in_channels is None else nn.Sequential(*conv_norm(in_channels, dim, 2))
        self.blocks = nn.ModuleList(
            SDTBlock(dim, num_attention_heads, activation_fn="gelu", drop_path=drop_path, **block_kwargs)
            for drop_path in drop_paths
        )

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, height, width) to (batch, dim, ceil(height / 2), ceil(width / 2))."""
        feature_map = self.downsample(feature_map)  # (B, D, H, W), of half the sides except in the first stage
        grid_size = tuple(feature_map.shape[-2:])
        hidden_states = feature_map.flatten(2).transpose(1, 2).contiguous()  # (B, H*W, D)
        rotary = raster_rotary_embedding(self.head_dim, hidden_states.shape[1], hidden_states.device)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                hidden_states = checkpoint(block, hidden_states, grid_size, None, rotary, use_reentrant=False)
            else:
                hidden_states = block(hidden_states, grid_size, None, rotary)
        return hidden_states.transpose(1, 2).unflatten(2, grid_size)  # (B, D, H, W)


class SDTHNetwork(nn.Module):
    """The hierarchical spatial decay transformer (SDT-H): four stages of spatial decay attention, then a classifier.

    With `spatial_decay="fixed"` and RMT's `decomposed` it is RMT. Images of any size work: every convolution of stride
    2 rounds up, so that 100x225 pixels give grids of 25x57, 13x29, 7x15 and 4x8 tokens.

    Args:
        num_channels: Channels of the images.
        num_labels: Classes; 0 for no classifier, the pooled features then being the output.
        hidden_sizes: Width of each stage.
        depths: Blocks of each stage.
        num_attention_heads: Heads of each stage.
        mlp_ratios: Hidden width of the MLP of each stage in units of the stage's.
        spatial_decay: How attention decays, one of `sdt_diffusion.attention.SPATIAL_DECAY_VARIANTS`.
        decomposed: Which stages attend along rows, then along columns. By default the first two, as in SDT for all
            sizes; RMT's S and B do so in the third as well.
        decay_initial_value: Exponent a of the most near-sighted head; it decays by log(1 - 2^-a) a patch, with
            `context` at the start.
        decay_heads_ranges: Span of the exponents over the heads, for each stage.
        layer_scale_init_values: Initial value of LayerScale in each stage; `None` for a stage without.
        drop_path_rate: Drop path probability of the last block; it grows linearly from 0 at the first.
        head_hidden_size: Width of the head before pooling.
        dropout: Dropout before the classifier.
        stem_strides: Strides of the stem's first and third convolution; (1, 1) or (1, 2) for images of few pixels.
        layer_norm_eps: Epsilon of the blocks' norms.
        initializer_range: Standard deviation of every linear layer's initial weights.

    Raises:
        ValueError: If a number is out of its range (`RANGES`), an option is unknown, sizes do not divide, or a value
            per stage is missing.
    """

    def __init__(
        self,
        num_channels: int = 3,
        num_labels: int = 1000,
        hidden_sizes: Sequence[int] = PRESETS["SDT-H-T"]["hidden_sizes"],
        depths: Sequence[int] = PRESETS["SDT-H-T"]["depths"],
        num_attention_heads: Sequence[int] = PRESETS["SDT-H-T"]["num_attention_heads"],
        mlp_ratios: Sequence[float] = PRESETS["SDT-H-T"]["mlp_ratios"],
        spatial_decay: str = "context",
        decomposed: Sequence[bool] = (True, True, False, False),
        decay_initial_value: float = 2.0,
        decay_heads_ranges: Sequence[float] = PRESETS["SDT-H-T"]["decay_heads_ranges"],
        layer_scale_init_values: Sequence[float | None] = PRESETS["SDT-H-T"]["layer_scale_init_values"],
        drop_path_rate: float = 0.1,
        head_hidden_size: int = 1024,
        stem_strides: Sequence[int] = (2, 2),
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
    ):
        values = dict(locals())
        super().__init__()
        for name, (kind, allowed) in RANGES.items():
            items = values[name] if isinstance(values[name], (list, tuple)) else [values[name]]
            for item in items:
                if not (item is None and name == "layer_scale_init_values"):
                    check_value(name, item, (kind,), allowed)
        per_stage = {
            "hidden_sizes": hidden_sizes,
            "depths": depths,
            "num_attention_heads": num_attention_heads,
            "mlp_ratios": mlp_ratios,
            "decomposed": decomposed,
            "decay_heads_ranges": decay_heads_ranges,
            "layer_scale_init_values": layer_scale_init_values,
        }
        for key, given in per_stage.items():
            if not isinstance(given, (list, tuple)) or not given:
                raise ValueError(f"{key} must be a list with a value for each stage, not {given!r}.")
            if len(given) != len(hidden_sizes):
                raise ValueError(f"{key} has {len(given)} values, but hidden_sizes has {len(hidden_sizes)} stages.")
        blocks = zip(depths, hidden_sizes, mlp_ratios, strict=True)
        parameters = sum(depth * (4 + 2 * ratio) * dim**2 for depth, dim, ratio in blocks)
        check_number("The number of parameters", parameters, Range(0, MAX_PARAMETERS))
        if not isinstance(stem_strides, (list, tuple)) or len(stem_strides) != 2:
            raise ValueError(f"stem_strides must be two strides, not {stem_strides}.")
        for dim, heads in zip(hidden_sizes, num_attention_heads, strict=True):
            if dim % (2 * heads):
                raise ValueError(f"A stage of width {dim} cannot be cut into {heads} heads of even width.")
        self.reduction = stem_strides[0] * stem_strides[1]
        self.num_channels, self.num_labels, self.head_hidden_size = num_channels, num_labels, head_hidden_size
        self.initializer_range = initializer_range

        first, num_blocks = hidden_sizes[0], sum(depths)
        self.patch_embed = nn.Sequential(
            *conv_norm(num_channels, first // 2, stem_strides[0]),
            nn.GELU(),
            *conv_norm(first // 2, first // 2, 1),
            nn.GELU(),
            *conv_norm(first // 2, first, stem_strides[1]),
            nn.GELU(),
            *conv_norm(first, first, 1),
        )
        drop_paths = [drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
        stages = [
            SDTHStage(
                hidden_sizes[i - 1] if i else None,
                hidden_sizes[i],
                drop_paths[sum(depths[:i]) : sum(depths[: i + 1])],
                num_attention_heads[i],
                mlp_ratio=mlp_ratios[i],
                norm_eps=layer_norm_eps,
                layer_scale_init_value=layer_scale_init_values[i],
                spatial_decay=spatial_decay,
                decomposed=decomposed[i],
                decay_initial_value=decay_initial_value,
                decay_heads_range=decay_heads_ranges[i],
                **BLOCK_KERNEL_SIZES,
            )
            for i in range(len(hidden_sizes))
        ]
        self.stages = nn.Sequential(*stages)
        self.proj = nn.Linear(hidden_sizes[-1], head_hidden_size)
        self.norm = nn.BatchNorm2d(head_hidden_size)
        self.act = nn.SiLU()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(head_hidden_size, num_labels) if num_labels else nn.Identity()
        self.apply(self.initialize)

    @torch.no_grad()
    def initialize(self, module: nn.Module) -> None:
        """Initialize one module: linear layers by a truncated normal, gates as RMT's decay, others as torch does."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.initializer_range)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, LayerScale, ContextAwareGate)):
            module.reset_parameters()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that sort parameters by depth, for layer-wise learning rates, in timm's form."""
        blocks = [
            (r"^(?:network\.)?stages\.(\d+)\.downsample", (0,)),
            (r"^(?:network\.)?stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:network\.)?(?:proj|norm)\.", (99999,)),
        ]
        stages = r"^(?:network\.)?stages\.(\d+)"
        return {"stem": r"^(?:network\.)?patch_embed", "blocks": stages if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        """Return no names: timm already excludes one-dimensional parameters, such as norms and log_alpha."""
        return set()

    def forward_stages(self, pixel_values: torch.Tensor, num_stages: int | None = None) -> list[torch.Tensor]:
        """Compute the output of the stem and of each stage.

        Args:
            pixel_values: See `forward`.
            num_stages: Number of stages to run; all by default.

        Returns:
            Tensors of shape (batch, width of the stage, height, width); the stem has the first stage's.

        Raises:
            ValueError: If the images have a wrong shape.
        """
        check_images(pixel_values, self.num_channels)
        feature_maps = [self.patch_embed(pixel_values)]  # (B, D_1, H/4, W/4), with the default strides
        for stage in self.stages[:num_stages]:
            feature_maps.append(stage(feature_maps[-1]))  # (B, D_i, H/2^(i+1), W/2^(i+1))
        return feature_maps

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the output of the last stage; same argument and errors as `forward_stages`."""
        return self.forward_stages(pixel_values)[-1]

    def forward_head(self, feature_map: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map the last stage's output to logits, or to the (batch, head_hidden_size) features before them."""
        hidden_states = self.proj(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, head_hidden_size, h, w)
        features = self.dropout(self.pool(self.act(self.norm(hidden_states))))  # (B, head_hidden_size)
        return features if pre_logits else self.head(features)  # (B, num_labels)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Classify images.

        Args:
            pixel_values: Normalized images, shape (batch, num_channels, height, width), of any size.

        Returns:
            Logits, shape (batch, num_labels).

        Raises:
            ValueError: If the images have a wrong shape.
        """
        return self.forward_head(self.forward_features(pixel_values))
