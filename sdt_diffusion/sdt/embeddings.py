"""What enters the first block of `SDTTransformer2DModel`: patches with their positions, timesteps and classes."""

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils.torch_utils import maybe_adjust_dtype_for_device
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .grid_scaling import scaled_axis


def position_embedding(
    dim: int,
    grid_size: tuple[int, int],
    trained_grid_size: tuple[int, int],
    device: torch.device | str | None = None,
    scaling: str = "interpolate",
) -> torch.Tensor:
    """Compute DiT's sine-cosine embedding of a grid.

    Args:
        dim: Width of the tokens.
        grid_size: Rows H and columns W of the grid.
        trained_grid_size: Rows and columns of the grid that the model is trained on.
        device: Device of the result.
        scaling: One of `sdt_diffusion.sdt.grid_scaling.POSITION_SCALINGS`: how positions of other grids are measured.

    Returns:
        A new tensor of shape (1, H*W, dim) in fp32; the first half of the channels encodes x, the second y.
    """
    height, width = grid_size
    y, x = (
        _sines_and_cosines(dim // 2, *scaled_axis(size, trained, dim // 2, scaling, device))
        for size, trained in zip(grid_size, trained_grid_size, strict=True)
    )  # (H, D/2), (W, D/2)
    x = x[None].expand(height, -1, -1)  # (H, W, D/2)
    y = y[:, None].expand(-1, width, -1)  # (H, W, D/2)
    return torch.cat([x, y], dim=-1).flatten(0, 1)[None]  # (1, N, D)


def _sines_and_cosines(dim: int, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Compute cat[sin, cos] of p theta^(-i / (dim / 2)) as diffusers does, which has no `theta`: (M,) to (M, dim)."""
    dtype = maybe_adjust_dtype_for_device(torch.float64, positions.device)  # fp32 where the device has no fp64
    exponents = torch.arange(dim // 2, dtype=dtype, device=positions.device) / (dim / 2)
    phases = torch.outer(positions, 1.0 / theta**exponents)  # (M, dim/2)
    return torch.cat([phases.sin(), phases.cos()], dim=1).float()


class SDTPatchEmbed(nn.Module):
    """Patches to tokens by one convolution, plus DiT's fixed 2D sine-cosine position embedding, after registers.

    Registers are learned tokens, the same for every image ("Vision Transformers Need Registers", arXiv 2309.16588).
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch_size: int,
        grid_size: tuple[int, int],
        position: bool = True,
        num_registers: int = 0,
    ):
        super().__init__()
        self.grid_size, self.position = grid_size, position
        self.registers = nn.Parameter(torch.zeros(num_registers, dim)) if num_registers else None
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        # Use the CPU even where models are built on the meta device: no file holds the values to load later.
        embedding = position_embedding(dim, grid_size, grid_size, device="cpu")
        self.register_buffer("pos_embed", embedding, persistent=False)

    def forward(self, sample: torch.Tensor, scaling: str = "interpolate") -> torch.Tensor:
        """Map (batch, channels, height, width) to (batch, registers + patches, dim), patches in raster order.

        On a grid other than the trained one, positions are scaled as `grid_scaling.POSITION_SCALINGS` says.
        """
        patches = self.proj(sample)  # (B, D, H/p, W/p)
        # Contiguous, as all blocks would inherit the strides of images, on which norms and linears are slow.
        tokens = patches.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
        if self.position:
            tokens = tokens + self._positions(tuple(patches.shape[-2:]), patches.device, scaling)
        tokens = tokens.to(self.proj.weight.dtype)  # not autocast's: the residual stream of fp32 models stays fp32
        if self.registers is None:
            return tokens
        return torch.cat([self.registers.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)  # (B, R+N, D)

    def _positions(self, grid_size, device, scaling):
        is_trained_grid = [size == trained for size, trained in zip(grid_size, self.grid_size, strict=True)]
        # With symbolic sizes this is not statically known, and the compiler makes one graph for all grids.
        if all(statically_known_true(equal) for equal in is_trained_grid):
            return self.pos_embed
        return position_embedding(self.proj.out_channels, grid_size, self.grid_size, device, scaling)


class TimestepClassEmbedding(nn.Module):
    """c = SiLU(timestep embedding + class embedding), shared by all blocks.

    The embedding table has one extra row: the null class `num_classes`, which replaces a label in training with
    probability `class_dropout_prob`, and which classifier-free guidance uses.

    Timesteps become cat[cos, sin] of scale * timestep * exp(-ln(1e4) i / (size / 2 - shift)). Scale 1 and shift 0 are
    facebookresearch/DiT's; diffusers' DiT has shift 1, and SiT looks at times of 0 to 1.

    With `interval` the embedding of timestep - end_timestep is added, whose last layer starts at zero ("Mean Flows for
    One-step Generative Modeling", arXiv 2505.13447).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        class_dropout_prob: float,
        frequency_embedding_size: int,
        timestep_scale: float = 1.0,
        timestep_frequency_shift: float = 0.0,
        interval: bool = False,
    ):
        super().__init__()
        if timestep_frequency_shift >= frequency_embedding_size // 2:
            raise ValueError(f"frequency_embedding_size {frequency_embedding_size} is too small.")
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.time_proj = Timesteps(frequency_embedding_size, True, timestep_frequency_shift, timestep_scale)
        self.timestep_embedder = TimestepEmbedding(frequency_embedding_size, dim)
        self.class_embedder = nn.Embedding(num_classes + 1, dim)
        self.interval_embedder = TimestepEmbedding(frequency_embedding_size, dim) if interval else None

    def forward(
        self,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        dtype: torch.dtype,
        force_drop_ids: torch.Tensor | None = None,
        end_timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed timesteps and labels, each of shape (batch,), to (batch, dim); `end_timestep` is `timestep` if absent.

        Raises:
            ValueError: If there is an `end_timestep`, but no embedder of intervals.
        """
        if end_timestep is not None and self.interval_embedder is None:
            raise ValueError("end_timestep needs a model with interval_conditioning: its config has it off.")
        if force_drop_ids is None and self.training and self.class_dropout_prob > 0:
            force_drop_ids = torch.rand(class_labels.shape, device=class_labels.device) < self.class_dropout_prob
        if force_drop_ids is not None:
            class_labels = torch.where(force_drop_ids.bool(), self.num_classes, class_labels)
        embedding = self.timestep_embedder(self.time_proj(timestep).to(dtype))  # (B, D)
        if self.interval_embedder is not None:
            interval = torch.zeros_like(timestep) if end_timestep is None else timestep - end_timestep
            embedding = embedding + self.interval_embedder(self.time_proj(interval).to(dtype))
        return F.silu(embedding + self.class_embedder(class_labels))  # (B, D)
