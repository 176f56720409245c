"""The transformer block shared by generation and classification."""

import importlib
import inspect
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry  # has no public name
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from torch import nn

from .attention import build_gate, check_variant
from .attention_processor import AttentionBackendMixin, SDTAttnProcessor
from .norms import RMSNorm, build_norm
from .utils.ranges import Range, check_number

#: Activations that diffusers' `FeedForward` supports.
ACTIVATIONS = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu")
#: Values of the config key `adaln`: where a block's modulation by the conditioning vector comes from.
ADALN_KINDS = {
    "full": "a matrix of each block (DiT)",
    "single": "one matrix for all blocks, and a vector of each (PixArt-alpha)",
    "low_rank": "one matrix for all blocks, and one of low rank of each (W.A.L.T)",
}


class DepthwiseConv(nn.Module):
    """Depth-wise convolution over the grid of tokens: of values, of a block's input, or inside its MLP."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """Map (batch, tokens, dim) to the same shape."""
        feature_map = hidden_states.transpose(1, 2).unflatten(2, grid_size)  # (B, D, H, W)
        return self.conv(feature_map).flatten(2).transpose(1, 2)  # (B, N, D)


def _depthwise_conv(dim, **kernel_size):
    """Build the `DepthwiseConv` of the option `name=size`; `None` for size 0."""
    ((name, size),) = kernel_size.items()
    if size and size % 2 == 0:
        raise ValueError(f"{name} must be odd or 0, not {size}.")
    return DepthwiseConv(dim, size) if size else None


class SDTAttention(nn.Module, AttentionBackendMixin, AttentionModuleMixin):
    """Multi-head self-attention with spatial decay.

    Args:
        dim: Width of the tokens.
        heads: Number of heads.
        head_dim: Width of a head; dim / heads by default.
        bias: Whether the query, key and value projections have a bias.
        dropout: Dropout after the output projection.
        spatial_decay: One of `SPATIAL_DECAY_VARIANTS`.
        decomposed: Attend along rows, then along columns.
        conditioning_dim: Width of the vector that conditions the gate, or `None`.
        decay_initial_value: See `ContextAwareGate`.
        decay_heads_range: See `ContextAwareGate`.
        decay_start: See `ContextAwareGate`.
        qk_norm: `None` or "rms_norm": normalize queries and keys per head.
        local_position_kernel_size: Kernel size of the local position encoding, a depth-wise convolution of the values
            that is added to the output of attention (RMT's LPE); 0 for none.
        eps: Epsilon of the query and key norms.
        num_registers: First tokens that have no place on the grid: nothing decays with distance to or from them.
    """

    _default_processor_cls = SDTAttnProcessor
    _available_processors = [SDTAttnProcessor]  # noqa: RUF012 (the name and type that diffusers looks for)
    is_cross_attention = False

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        spatial_decay: str = "context",
        decomposed: bool = False,
        conditioning_dim: int | None = None,
        decay_initial_value: float = 2.0,
        decay_heads_range: float = 6.0,
        decay_start: str = "rmt",
        qk_norm: str | None = None,
        local_position_kernel_size: int = 0,
        eps: float = 1e-6,
        num_registers: int = 0,
    ):
        super().__init__()
        for name, number in (("dim", dim), ("heads", heads), ("head_dim", 1 if head_dim is None else head_dim)):
            check_number(name, number, Range(1, 1_000_000))
        if head_dim is None:
            if dim % heads:
                raise ValueError(f"dim {dim} is not divisible by {heads} heads; give head_dim.")
            head_dim = dim // heads
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"Unknown qk_norm {qk_norm!r}: choose None or 'rms_norm'.")
        check_number("num_registers", num_registers, Range(0, 1_000_000))
        if decomposed and num_registers:
            raise ValueError(f"num_registers {num_registers} are in no row or column: set decomposed to false, or 0.")
        self.heads, self.head_dim, self.use_bias, self.num_registers = heads, head_dim, bias, num_registers
        self.spatial_decay, self.decomposed = check_variant(spatial_decay), decomposed
        inner_dim = heads * head_dim
        self.to_q = nn.Linear(dim, inner_dim, bias=bias)
        self.to_k = nn.Linear(dim, inner_dim, bias=bias)
        self.to_v = nn.Linear(dim, inner_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim), nn.Dropout(dropout)])
        self.norm_q = RMSNorm(head_dim, eps=eps) if qk_norm else None
        self.norm_k = RMSNorm(head_dim, eps=eps) if qk_norm else None
        decay = (decay_initial_value, decay_heads_range, decay_start)
        self.gate = build_gate(spatial_decay, dim, heads, conditioning_dim, *decay)
        self.local_position = _depthwise_conv(inner_dim, local_position_kernel_size=local_position_kernel_size)
        self.set_processor(self._default_processor_cls())

    def set_processor(self, processor: Any) -> None:
        """Set what computes attention: an `SDTAttnProcessor`, or a callable with the arguments of its `__call__`.

        Raises:
            ValueError: If it knows no `grid_size`, as diffusers' own, which would leave out the decay.
        """
        if not callable(processor) or "grid_size" not in inspect.signature(processor).parameters:
            raise ValueError(
                f"{type(processor).__name__} cannot compute spatial decay attention, as it takes no grid_size: use "
                "SDTAttnProcessor, and set_attention_backend to choose kernels of diffusers."
            )
        super().set_processor(processor)

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid_size: tuple[int, int],
        conditioning: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        decay_scale: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map tokens (batch, tokens, dim) to the same shape; see `SDTBlock.forward`."""
        options = {} if places is None else {"places": places}  # which processors of others may not know
        return self.processor(self, hidden_states, grid_size, conditioning, image_rotary_emb, decay_scale, **options)


class AdaLayerNormZero(nn.Module):
    """DiT's adaLN-Zero: a norm without affine parameters, modulated by the conditioning vector c.

    The six parts of the modulation are, with a bias that is not written here, by `adaln`:

        full       W_l c              DiT
        single     W c + b_l          PixArt-alpha (arXiv 2310.00426)
        low_rank   W c + B_l A_l c    W.A.L.T (arXiv 2312.06662)

    W c, which blocks share, is computed outside. W_l, W, b_l and B_l are zero at initialization. The caller applies
    the SiLU of the vector, once for all blocks.
    """

    def __init__(
        self,
        dim: int,
        conditioning_dim: int,
        eps: float,
        norm_type: str = "layer",
        adaln: str = "full",
        adaln_rank: int = 64,
    ):
        super().__init__()
        if adaln not in ADALN_KINDS:
            raise ValueError(f"Unknown adaln {adaln!r}: choose one of {', '.join(ADALN_KINDS)}.")
        self.adaln = adaln
        self.norm = build_norm(norm_type, dim, eps, affine=False)
        if adaln == "single":
            self.table = nn.Parameter(torch.zeros(6 * dim))
        elif adaln == "low_rank":
            self.down = nn.Linear(conditioning_dim, adaln_rank, bias=False)
            self.linear = nn.Linear(adaln_rank, 6 * dim)
        else:
            self.linear = nn.Linear(conditioning_dim, 6 * dim)

    def forward(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor, shared: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return the modulated tokens, then gate_msa, shift_mlp, scale_mlp and gate_mlp of shape (batch, 1, dim).

        Args:
            hidden_states: Shape (batch, tokens, dim).
            conditioning: Shape (batch, conditioning_dim), or (batch, tokens, conditioning_dim) for one of each token,
                with which what is returned has all tokens too.
            shared: W c, shape (batch, 6 * dim), unless `adaln` is "full".
        """
        if (shared is None) != (self.adaln == "full"):
            raise ValueError(f"adaln {self.adaln!r} takes {'no' if shared is not None else 'a'} shared modulation.")
        if self.adaln == "low_rank":
            conditioning = self.down(conditioning)
        own = self.table if self.adaln == "single" else self.linear(conditioning)
        modulation = own if shared is None else shared + own
        modulation = modulation if modulation.ndim == 3 else modulation.unsqueeze(1)  # (B, 1 or N, 6*D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)  # (B, 1 or N, D)
        hidden_states = modulate(self.norm(hidden_states), shift_msa, scale_msa)
        return hidden_states, gate_msa, shift_mlp, scale_mlp, gate_mlp


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Compute x (1 + scale) + shift."""
    return x * (1 + scale) + shift


class SDTFeedForward(FeedForward):
    """diffusers' MLP, with a depth-wise convolution of the hidden tokens added to them unless `kernel_size` is 0."""

    def __init__(self, dim: int, inner_dim: int, activation_fn: str, dropout: float, kernel_size: int):
        super().__init__(dim, inner_dim=inner_dim, activation_fn=activation_fn, dropout=dropout)
        self.local = _depthwise_conv(inner_dim, mlp_kernel_size=kernel_size)

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """Map (batch, tokens, dim) to the same shape."""
        activation, dropout, projection = self.net
        hidden_states = activation(hidden_states)  # (B, N, inner_dim)
        if self.local is not None:
            hidden_states = hidden_states + self.local(hidden_states, grid_size)
        return projection(dropout(hidden_states))  # (B, N, D)


class SDTBlock(nn.Module):
    """Spatial decay attention and an MLP, each pre-normalized and residual.

    With a conditioning width, adaLN-Zero modulates both branches (DiT's block, in facebookresearch/DiT's numerics) and
    the vector conditions the gate too; without one the norms have their own affine parameters.

    Args:
        dim: Width of the tokens.
        num_attention_heads: Number of heads.
        attention_head_dim: Width of a head; dim / heads by default.
        mlp_ratio: Hidden width of the MLP in units of dim.
        activation_fn: Activation of the MLP, in diffusers' names.
        dropout: Dropout after attention and in the MLP.
        conditioning_dim: Width of the conditioning vector, or `None` for plain pre-norm.
        gate_conditioning: Whether the vector conditions the gate of the decay as well.
        norm_eps: Epsilon of the norms.
        norm_type: One of `norms.NORM_TYPES`.
        adaln: One of `ADALN_KINDS`.
        adaln_rank: Rank of the matrix of each block for "low_rank".
        conditional_position_kernel_size: Kernel size of a depth-wise convolution of the block's input that is added to
            it before anything else (conditional position encoding); 0 for none.
        mlp_kernel_size: Kernel size of a depth-wise convolution inside the MLP; 0 for none.
        layer_scale_init_value: Initial value of a learned factor per channel on both branches; `None` for none.
        drop_path: Probability that training drops a branch of a sample.
        **attention_kwargs: Further options of `SDTAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        activation_fn: str = "gelu-approximate",
        dropout: float = 0.0,
        conditioning_dim: int | None = None,
        gate_conditioning: bool = True,
        norm_eps: float = 1e-6,
        norm_type: str = "layer",
        adaln: str = "full",
        adaln_rank: int = 64,
        conditional_position_kernel_size: int = 0,
        mlp_kernel_size: int = 0,
        layer_scale_init_value: float | None = None,
        drop_path: float = 0.0,
        **attention_kwargs,
    ):
        super().__init__()
        check_number("mlp_ratio", mlp_ratio, Range(0, 64, with_least=False))
        check_number("dropout", dropout, Range(0, 1))
        check_number("norm_eps", norm_eps, Range(0, 1))
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and less than 1, not {drop_path}.")
        if activation_fn not in ACTIVATIONS:
            raise ValueError(f"Unknown activation_fn {activation_fn!r}: choose one of {', '.join(ACTIVATIONS)}.")
        self.conditioned = conditioning_dim is not None
        self.conditional_position = _depthwise_conv(
            dim, conditional_position_kernel_size=conditional_position_kernel_size
        )
        self.norm1 = (
            build_norm(norm_type, dim, norm_eps, affine=True)
            if conditioning_dim is None
            else AdaLayerNormZero(dim, conditioning_dim, norm_eps, norm_type, adaln, adaln_rank)
        )
        self.attn = SDTAttention(
            dim,
            num_attention_heads,
            attention_head_dim,
            dropout=dropout,
            conditioning_dim=conditioning_dim if gate_conditioning else None,
            **attention_kwargs,
        )
        self.norm2 = build_norm(norm_type, dim, norm_eps, affine=not self.conditioned)
        self.ff = SDTFeedForward(dim, int(dim * mlp_ratio), activation_fn, dropout, mlp_kernel_size)
        self.layer_scale1, self.layer_scale2, self.drop_path = nn.Identity(), nn.Identity(), nn.Identity()
        if layer_scale_init_value is not None or drop_path:
            # Not an import statement, for which the checks of a folder's code would ask diffusion models for timm.
            layers = importlib.import_module("timm.layers")
            if layer_scale_init_value is not None:
                self.layer_scale1 = layers.LayerScale(dim, layer_scale_init_value)
                self.layer_scale2 = layers.LayerScale(dim, layer_scale_init_value)
            self.drop_path = layers.DropPath(drop_path)

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid_size: tuple[int, int],
        conditioning: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        decay_scale: torch.Tensor | None = None,
        modulation: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the block.

        Args:
            hidden_states: Registers, if any, then patches in raster order, shape (batch, tokens, dim).
            grid_size: Rows and columns of the patch grid.
            conditioning: SiLU of the conditioning vector, shape (batch, conditioning_dim), or what conditions each
                token, shape (batch, tokens, conditioning_dim); required if and only if the block was built with it.
            image_rotary_emb: Cosines and sines of the rotary embedding, each of shape (tokens, head_dim), or `None`.
            decay_scale: Factor of the decay, shape (batch, heads) or (batch, 1), or `None` for 1.
            modulation: What blocks share of the modulation, shape (batch, 6 * dim), unless `adaln` is "full".
            places: Where on the grid the patches are, shape (patches,), if they are only some of it, which a block
                with convolutions does not take.

        Returns:
            Tokens of the same shape.

        Raises:
            ValueError: If conditioning or modulation is missing or unexpected.
        """
        if self.conditioned != (conditioning is not None):
            raise ValueError(
                "This block was built with conditioning_dim and needs conditioning."
                if self.conditioned
                else "This block was built without conditioning_dim and takes no conditioning."
            )
        if self.conditional_position is not None:
            hidden_states = hidden_states + self.conditional_position(hidden_states, grid_size)
        if not self.conditioned:
            branch = self.attn(self.norm1(hidden_states), grid_size, None, image_rotary_emb, decay_scale, places)
            hidden_states = hidden_states + self.drop_path(self.layer_scale1(branch))
            branch = self.ff(self.norm2(hidden_states), grid_size)
            return hidden_states + self.drop_path(self.layer_scale2(branch))

        attention_input, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, conditioning, modulation)
        branch = gate_msa * self.attn(attention_input, grid_size, conditioning, image_rotary_emb, decay_scale, places)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(branch))
        branch = gate_mlp * self.ff(modulate(self.norm2(hidden_states), shift_mlp, scale_mlp), grid_size)
        return hidden_states + self.drop_path(self.layer_scale2(branch))


# Tell diffusers' caching hooks (FirstBlockCache, MagCache ...) which output of a block holds the tokens.
TransformerBlockRegistry.register(SDTBlock, TransformerBlockMetadata(return_hidden_states_index=0))
