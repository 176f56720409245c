"""Let some patches skip the middle blocks in training (TREAD, arXiv 2501.04765)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch


class TokenRoute(NamedTuple):
    """Which patches go through all blocks; the others skip some, and are then as they were before.

    Registers go through all blocks.

    Args:
        places: Patches that skip nothing, by their places in raster order, sorted, shape (patches,), int64.
        start: Blocks before the others leave.
        end: Blocks before they are back.
    """

    places: torch.Tensor
    start: int
    end: int

    def rows(self, num_registers: int) -> torch.Tensor:
        """Return where registers and the patches are among all tokens, shape (num_registers + patches,)."""
        registers = torch.arange(num_registers, device=self.places.device)
        return torch.cat([registers, self.places + num_registers])

    def take(self, tokens: torch.Tensor, num_registers: int) -> torch.Tensor:
        """Return registers and patches that go on, of all tokens, shape (..., tokens, channels)."""
        return tokens.index_select(-2, self.rows(num_registers))

    def put_back(self, tokens: torch.Tensor, before: torch.Tensor, num_registers: int) -> torch.Tensor:
        """Return all tokens: those that went on, and the others as before."""
        return before.to(tokens.dtype).index_copy(-2, self.rows(num_registers), tokens)

    def inputs(self, inputs: tuple[Any, ...], num_registers: int) -> tuple[Any, ...]:
        """Return what a block takes besides tokens, for those that go on: rows of the rotary embedding, and places."""
        grid_size, conditioning, rotary, decay_scale, modulation, _ = inputs
        rotary = None if rotary is None else tuple(self.take(x, num_registers) for x in rotary)
        return grid_size, conditioning, rotary, decay_scale, modulation, self.places


def check_route(
    route: TokenRoute, config: Mapping[str, Any], grid_size: tuple[int, int], block_outputs: Sequence[int] = ()
) -> None:
    """Refuse a route that does not fit a model or its input.

    Args:
        route: The route.
        config: The model's config.
        grid_size: Rows and columns of the patch grid.
        block_outputs: Blocks whose output is asked for.

    Raises:
        ValueError: Says why.
    """
    places, start, end = route
    needs_all = {
        "spatial_decay raster": config["spatial_decay"] == "raster",
        "decomposed": config["decomposed"],
        "local_position_kernel_size": config["local_position_kernel_size"],
        "long_skips": config["long_skips"],
    }
    for option, given in needs_all.items():
        if given:
            raise ValueError(f"A route of tokens leaves out some, and {option} needs all of them: use one of the two.")
    depth, patches = config["num_layers"], grid_size[0] * grid_size[1]
    if not 0 <= start < end <= depth:
        raise ValueError(f"A route must begin before it ends, within the {depth} blocks, not be {start} to {end}.")
    inside = [block for block in block_outputs if start <= block < end]
    if inside:
        raise ValueError(
            f"A route from block {start} to {end} leaves out tokens of block {inside[0]} (from 0), whose output is "
            "asked for: choose an earlier or a later block, or another route."
        )
    if places.ndim != 1 or places.dtype != torch.int64 or not 1 <= len(places) <= patches:
        raise ValueError(
            f"The places of a route must be 1 to {patches} whole numbers, not a tensor of shape {tuple(places.shape)} "
            f"and {places.dtype}."
        )
    # Values on the CPU only: reading them from an accelerator would stall it.
    if places.device.type == "cpu" and not torch.compiler.is_compiling():
        inside_grid = int(places[0]) >= 0 and int(places[-1]) < patches
        if not inside_grid or bool((places.diff() <= 0).any()):
            raise ValueError(f"The places of a route must be sorted, without repetition, and of 0..{patches - 1}.")
