"""How positions and distances are measured on grids other than the trained one.

    pipe.transformer.set_grid_scaling(rotary_scaling="ntk", decay_distance_scaling=True)
    images = pipe([3, 7], height=512, width=512).images  # of a model trained at 256

With s the ratio of a side to the trained one, position p and frequency w_i = 10000^(-i/n), i < n, a sine's phase is

    none         p w_i                     positions run beyond the trained ones
    interpolate  p w_i / s                 positions of the trained extent, nearer to each other
    ntk          p w_i s^(-i/(n-1))        the fastest sines as in `none`, the slowest as in `interpolate`

for each axis alone. On the trained grid, s is 1 and all are the same, bit for bit. Interpolation is that of arXiv
2306.15595; NTK-aware scaling takes 10000 s^(n/(n-1)) for 10000, as the `ntk` of transformers and diffusers does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_rotary_pos_embed

#: Ways to scale positions; see above.
POSITION_SCALINGS = ("none", "interpolate", "ntk")
#: Base of all frequencies.
THETA = 10000.0
#: Variants of the decay in which distance plays no part.
WITHOUT_DISTANCE = ("none", "content")


def scaled_axis(
    size: int, trained_size: int, dim: int, scaling: str, device: torch.device | str | None = None
) -> tuple[torch.Tensor, float]:
    """Return the positions along an axis, shape (size,) in fp32, and the base of the frequencies.

    Args:
        size: Patches along the axis.
        trained_size: Patches along it in training.
        dim: Channels of the axis: twice the number of frequencies.
        scaling: One of `POSITION_SCALINGS`.
        device: Device of the result.
    """
    positions = torch.arange(size, dtype=torch.float32, device=device)
    if scaling == "interpolate":
        return positions * (trained_size / size), THETA
    if scaling == "ntk" and dim > 2:  # a single frequency is the fastest one, which stays
        return positions, THETA * (size / trained_size) ** (dim / (dim - 2))
    return positions, THETA


def rotary_embedding(
    head_dim: int,
    grid_size: tuple[int, int],
    trained_grid_size: tuple[int, int],
    scaling: str = "none",
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a 2D rotary embedding: half of a head for rows, half for columns.

    Returns:
        Cosines and sines, each of shape (H*W, head_dim), in fp32.
    """
    height, width = grid_size
    half = head_dim // 2
    (y, y_theta), (x, x_theta) = (
        scaled_axis(size, trained, half, scaling, device)
        for size, trained in zip(grid_size, trained_grid_size, strict=True)
    )
    rows = get_1d_rotary_pos_embed(half, y.repeat_interleave(width), y_theta, use_real=True)  # each (N, d/2)
    columns = get_1d_rotary_pos_embed(half, x.repeat(height), x_theta, use_real=True)  # each (N, d/2)
    cosines, sines = (torch.cat(pair, dim=-1) for pair in zip(rows, columns, strict=True))  # each (N, d)
    return cosines, sines


def check_grid_scaling(config: Any) -> None:
    """Refuse scalings that do not exist, or that scale what a model does not have.

    Raises:
        ValueError: Names the key of the config, its value, and what is allowed.
    """
    for name in ("pos_embed_scaling", "rotary_scaling"):
        if config[name] not in POSITION_SCALINGS:
            raise ValueError(f"{name} must be {' or '.join(POSITION_SCALINGS)}, not {config[name]!r}.")
    if not isinstance(config["decay_distance_scaling"], bool):
        raise ValueError(f"decay_distance_scaling must be true or false, not {config['decay_distance_scaling']!r}.")
    if config["rotary_scaling"] != "none" and not config["rotary"]:
        raise ValueError(f"rotary_scaling is {config['rotary_scaling']!r}, but the model has no rotary embedding.")
    if config["pos_embed_scaling"] != "interpolate" and config["position_embedding"] == "none":
        raise ValueError(f"pos_embed_scaling is {config['pos_embed_scaling']!r}, but position_embedding is 'none'.")
    if config["decay_distance_scaling"] and config["spatial_decay"] in WITHOUT_DISTANCE:
        raise ValueError(
            f"decay_distance_scaling scales the distance of the decay, but spatial_decay {config['spatial_decay']!r} "
            "has none."
        )


class GridScalingMixin:
    """Lets a transformer measure positions and distances on other grids than the trained one in several ways."""

    config: Any
    pos_embed: Any
    register_to_config: Any

    def set_grid_scaling(
        self,
        pos_embed_scaling: str | None = None,
        rotary_scaling: str | None = None,
        decay_distance_scaling: bool | None = None,
    ) -> None:
        """Choose how positions and distances are measured on other grids; `None` changes nothing.

        The choice becomes part of the config, and is saved with the model. It changes nothing on the trained grid.

        Args:
            pos_embed_scaling: One of `POSITION_SCALINGS`, for the position embedding; models start with "interpolate".
            rotary_scaling: One of them for the rotary embedding; models start with "none".
            decay_distance_scaling: Whether the decay measures distances in patches of the trained grid, which keeps
                its reach as a part of the image, instead of in patches of the grid at hand; models start with `False`.

        Raises:
            ValueError: If there is no such scaling, or the model has nothing to scale.
        """
        given = {
            "pos_embed_scaling": pos_embed_scaling,
            "rotary_scaling": rotary_scaling,
            "decay_distance_scaling": decay_distance_scaling,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        check_grid_scaling({**self.config, **changes})
        self.register_to_config(**changes)

    def _rotary_embedding(self, grid_size, device, wide_head=False):
        """Return the embedding for the blocks of the backbone, or of the wide head; `None` for none."""
        config = self.config
        if not config.rotary:
            return None
        head_dim = config.head_width // config.num_attention_heads if wide_head else config.attention_head_dim
        trained = self.pos_embed.grid_size
        cosines, sines = rotary_embedding(head_dim, grid_size, trained, config.rotary_scaling, device)
        registers = (0, 0, 0 if wide_head else config.num_registers, 0)  # which come first, and are not rotated
        return F.pad(cosines, registers, value=1.0), F.pad(sines, registers)

    def _factors_of_decay(self, decay_scale, batch_size, grid_size, device):
        """Return the factors of the decay, shape (batch, heads) or (batch, 1); `None` for no factor."""
        if decay_scale is not None:
            shapes = ((batch_size,), (batch_size, self.config.num_attention_heads))
            if self.config.spatial_decay == "none" or decay_scale.shape not in shapes:
                raise ValueError(
                    f"decay_scale, of shape {tuple(decay_scale.shape)}, must have shape {shapes[0]} or {shapes[1]}, "
                    f"and the model a spatial decay; its spatial_decay is {self.config.spatial_decay!r}."
                )
            decay_scale = decay_scale.reshape(batch_size, -1)
        if self.config.decay_distance_scaling:
            # M is linear in the distance, so that a factor of the decay is one of the distance.
            factor = self._distance_factor(grid_size)
            decay_scale = torch.ones(batch_size, 1, device=device) if decay_scale is None else decay_scale
            decay_scale = decay_scale * factor
        return decay_scale

    def _distance_factor(self, grid_size):
        """Return the side of a patch in units of a trained patch; the geometric mean of the two axes' sides.

        Distances along the raster grow with the number of patches instead of its root.
        """
        trained_height, trained_width = self.pos_embed.grid_size
        area = trained_height * trained_width / (grid_size[0] * grid_size[1])
        return area if self.config.spatial_decay == "raster" and not self.config.decomposed else area**0.5
