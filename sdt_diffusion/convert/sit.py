"""Convert checkpoints of willisma/SiT: DiT's network, trained on the velocity of a flow from noise to data.

SiT's time t is 0 at noise and 1 at data, it predicts data - noise, and the network sees t itself. Here sigma = 1 - t,
the prediction is noise - data, and the network sees the timestep 1000 sigma. `timestep_scale` 1/1000 turns that into
sigma. cos((1 - sigma) w) and sin((1 - sigma) w) are sums of cos(sigma w) and sin(sigma w), and so the rest of the
difference is one of weights: a reflection of the first layer that sees time, and the sign of the last layer.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from . import Source, check_names, flow_scheduler
from .facebook_dit import check_shapes, depth_of, dit_names, read_network

#: Config that turns timesteps 1000 sigma into sigma.
TIMESTEP_SCALE = 1e-3


def read_sit(state_dict: Mapping[str, torch.Tensor], num_attention_heads: int | None = None) -> Source:
    """Read a checkpoint of SiT with linear paths and velocity prediction; see `read_network`."""
    check_names(state_dict, {*dit_names(depth_of(state_dict)), "pos_embed"}, "SiT")
    check_shapes(state_dict)
    return flow_source("SiT", *read_network(state_dict, num_attention_heads))


def flow_source(name: str, config: dict[str, Any], weights: dict[str, torch.Tensor], shift: float = 1.0) -> Source:
    """Return the source of a network in SiT's convention, without the outputs for a variance, which SiT ignores.

    Args:
        name: Name of the repository.
        config: See `read_network`.
        weights: See `read_network`.
        shift: What moves the noise levels of sampling towards noise; see `flow_scheduler`.
    """
    channels, weights = config["in_channels"], dict(weights)
    for key in ("proj_out_2.weight", "proj_out_2.bias"):
        outputs = weights[key].unflatten(0, (-1, config["out_channels"]))  # (p*p, C or 2C, ...)
        weights[key] = outputs[:, :channels].flatten(0, 1)
    config = {**config, "out_channels": channels, "timestep_scale": TIMESTEP_SCALE}
    return Source(name, config, reverse_flow(weights), flow_scheduler(shift), 250, uniform_sigmas=True)


@torch.no_grad()
def reverse_flow(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of v'(x, sigma) = -v(x, 1 - sigma); doing this twice returns the given weights.

    Args:
        weights: Of an `SDTTransformer2DModel` with `timestep_scale` 1/1000, in fp32.
    """
    key = "time_class_embed.timestep_embedder.linear_1.weight"
    cos_part, sin_part = weights[key].double().chunk(2, dim=1)  # (D, F/2)
    half = cos_part.shape[1]
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / half)  # (F/2,)
    cos, sin = frequency.cos(), frequency.sin()
    rotated = torch.cat([cos_part * cos + sin_part * sin, cos_part * sin - sin_part * cos], dim=1)  # (D, F)
    last = {name: -weights[name] for name in ("proj_out_2.weight", "proj_out_2.bias")}
    return {**weights, key: rotated.float(), **last}
