"""Draw the patches that skip the middle blocks of a step (TREAD, arXiv 2501.04765)."""

from collections.abc import Sequence

import torch
from torch import nn

from ...attention.dispatch import WITHOUT_PLACES
from ...attention_processor import named_backends
from ...sdt.config_ranges import sides
from ...sdt.token_route import TokenRoute, check_route
from ...utils.seeding import Draws
from .auxiliary import AuxiliaryLoss
from .objective import ObjectiveArguments


class TokenRouting:
    """Draws the route of a step: the same for all its images, in all batches and processes.

    Args:
        num_patches: Patches of an image.
        ratio: Share of them that skip blocks; their number is the same in all steps.
        start: Blocks before they leave.
        end: Blocks before they are back.

    Raises:
        ValueError: If none would skip blocks, or none would be left.
    """

    def __init__(self, num_patches: int, ratio: float, start: int, end: int):
        self.num_patches, self.num_skipped = num_patches, round(ratio * num_patches)
        self.start, self.end = start, end
        if not 0 < self.num_skipped < num_patches:
            raise ValueError(
                f"routing_ratio {ratio:g} of {num_patches} patches is {self.num_skipped}: at least one must skip "
                "blocks, and at least one must not."
            )

    def __call__(self, draws: Draws) -> TokenRoute:
        """Draw the route of the step of `draws`."""
        order = torch.randperm(self.num_patches, generator=draws.generator, device=draws.device)
        return TokenRoute(order[self.num_skipped :].sort().values, self.start, self.end)

    def example(self, device: torch.device | str = "cpu") -> TokenRoute:
        """Return a route of the same size, not drawn."""
        places = torch.arange(self.num_patches - self.num_skipped, device=device)
        return TokenRoute(places, self.start, self.end)


def build_routing(
    args: ObjectiveArguments, model: nn.Module, auxiliary: Sequence[AuxiliaryLoss] = ()
) -> TokenRouting | None:
    """Build what draws routes, or return `None` if `routing_ratio` is 0.

    Args:
        args: Share and blocks.
        model: The diffusion transformer.
        auxiliary: Further terms of the loss.

    Raises:
        ValueError: If the model, its attention, or a term needs all tokens in all blocks, or there are no such blocks;
            names both.
    """
    if not args.routing_ratio:
        return None
    config = model.config
    depth, grid_size = config.num_layers, tuple(side // config.patch_size for side in sides(config.sample_size))
    blocks = args.routing_blocks or [max(1, round(depth / 14)), round(depth * 6 / 7)]
    routing = TokenRouting(grid_size[0] * grid_size[1], args.routing_ratio, *blocks)
    try:
        asked = [block for term in auxiliary for block in term.blocks]
        check_route(routing.example(), config, grid_size, asked)
    except ValueError as error:
        raise ValueError(f"routing_ratio {args.routing_ratio:g}, routing_blocks {blocks}: {error}") from error
    backends = named_backends(model) & set(WITHOUT_PLACES) if config.spatial_decay != "none" else None
    if backends:
        raise ValueError(
            f"routing_ratio leaves out tokens, and the attention_backend {', '.join(sorted(backends))} needs all of "
            "the grid: name dense, or none."
        )
    if any(getattr(getattr(module, "processor", None), "prune_eps", 0) for module in model.modules()):
        raise ValueError("routing_ratio leaves out tokens, which skipping needs: set attention_prune_eps to 0.")
    return routing
