"""Record the spatial decay of a network, and map what it lets each patch look at."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..attention import BACKENDS, spatial_decay
from ..attention_processor import SDTAttnProcessor
from ..blocks import SDTAttention


@dataclass
class BlockDecay:
    """The decay of a block for one image that went through it.

    Args:
        block: Its number, counted through all stages.
        gate: G, shape (heads, tokens).
        alpha: Shape (heads,).
        grid_size: Rows and columns of the patch grid.
        variant: One of `SPATIAL_DECAY_VARIANTS`.
        decomposed: Whether it attends along rows, then along columns.
        attention: How much of each token (last) is in the output for each token, shape (heads, tokens, tokens): the
            softmax, or the product of the two passes; `None` where it was not asked for. Registers are left out.
    """

    block: int
    gate: torch.Tensor
    alpha: torch.Tensor
    grid_size: tuple[int, int]
    variant: str
    decomposed: bool
    attention: torch.Tensor | None

    def describe(self) -> str:
        """Describe the block in words."""
        passes = ", along rows, then columns" if self.decomposed else ""
        return f"block {self.block}: {self.grid_size[0]} x {self.grid_size[1]} patches, {self.variant}{passes}"


@contextmanager
def record_decays(model: nn.Module, blocks: Sequence[int] = (), attention: bool = False) -> Iterator[list[BlockDecay]]:
    """Record the decay of blocks while one image goes through a model.

    Args:
        model: A model with spatial decay attention.
        blocks: Numbers of the blocks; the first, the middle and the last by default.
        attention: Whether to record the attention too, which takes memory for each pair of tokens.

    Yields:
        A list, which the model's forward pass fills, for a batch of one.

    Raises:
        ValueError: If the model has no spatial decay, or no such block.
    """
    modules = [module for module in model.modules() if isinstance(module, SDTAttention)]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no spatial decay attention.")
    blocks = blocks or sorted({0, len(modules) // 2, len(modules) - 1})
    unknown = [block for block in blocks if not 0 <= block < len(modules)]
    if unknown:
        raise ValueError(f"There is no block {unknown[0]}: the model has blocks 0..{len(modules) - 1}.")
    for block in blocks:
        if modules[block].spatial_decay == "none":
            raise ValueError(f"Block {block} has spatial_decay 'none': there is no decay to draw.")
    records, processors = [], {block: modules[block].processor for block in blocks}
    try:
        for block in blocks:
            modules[block].set_processor(_RecordingProcessor(block, attention, records))
        yield records
    finally:
        for block, processor in processors.items():
            modules[block].set_processor(processor)


def decay_maps(decay: BlockDecay, patches: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Compute exp(M), the factor by which decay multiplies attention between patches before it is normalized.

    Decomposed attention reaches (y', x') from (y, x) along the column x to the row y', and along that row to x'. The
    factor is the product of the two passes'.

    Args:
        decay: The block's.
        patches: Rows and columns of the patches to look from.

    Returns:
        Shape (patches, heads, rows, columns).

    Raises:
        ValueError: If a patch is not on the grid.
    """
    rows, columns = decay.grid_size
    tokens = _tokens_of(decay, patches)
    if not decay.decomposed:
        heads = [  # one by one, because M has an entry for each pair of tokens
            spatial_decay(decay.gate[None, None, head], decay.alpha[head, None], decay.grid_size, decay.variant)
            for head in range(len(decay.alpha))
        ]
        return torch.stack([m[0, 0, tokens] for m in heads], dim=1).exp().unflatten(2, decay.grid_size)
    gate = decay.gate.unflatten(1, decay.grid_size)
    along_rows = spatial_decay(gate.transpose(0, 1), decay.alpha, (1, columns), decay.variant)
    along_columns = spatial_decay(gate.permute(2, 0, 1), decay.alpha, (rows, 1), decay.variant)
    maps = [along_columns[x, :, y, :, None] + along_rows[:, :, x].transpose(0, 1) for y, x in patches]
    return torch.stack(maps).exp()


def attention_maps(decay: BlockDecay, patches: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return the attention from patches, shape (patches, heads, rows, columns); it sums to 1 over the grid.

    With registers the sum is less, by the attention to them.

    Raises:
        ValueError: If it was not recorded, or a patch is not on the grid.
    """
    if decay.attention is None:
        raise ValueError("The attention was not recorded: call record_decays with attention=True.")
    tokens = _tokens_of(decay, patches)
    return decay.attention[:, tokens].transpose(0, 1).unflatten(2, decay.grid_size)


def half_distances(decay: BlockDecay, patches: Sequence[tuple[int, int]]) -> torch.Tensor | None:
    """Compute the distance in patches at which the factor falls to a half, for partners with the grid's mean gate.

    Returns:
        Shape (patches, heads); in steps along the raster for `raster`; `None` for `content`.
    """
    if decay.variant == "content":
        return None
    tokens = _tokens_of(decay, patches)
    gate = decay.gate.mean(dim=1, keepdim=True)
    if decay.variant != "raster":
        gate = (gate + decay.gate[:, tokens]) / 2
    return (math.log(2) / (-gate * decay.alpha[:, None])).expand(-1, len(tokens)).T


def _tokens_of(decay: BlockDecay, patches: Sequence[tuple[int, int]]) -> list[int]:
    rows, columns = decay.grid_size
    for y, x in patches:
        if not (0 <= y < rows and 0 <= x < columns):
            raise ValueError(f"patches must be on the grid of {rows} x {columns}, counted from 0, not {y},{x}.")
    return [y * columns + x for y, x in patches]


class _RecordingProcessor(SDTAttnProcessor):
    """Attends as usual, and records gates and, if asked to, attention.

    To obtain the attention, one-hot marks of the tokens are appended to the values as further channels: what comes
    out in those channels, after one pass or two, is how much of each token is in the output.
    """

    def __init__(self, block: int, with_attention: bool, records: list[BlockDecay]):
        super().__init__()
        self.block, self.records, self.attention = block, records, None
        self.backend = self._attend if with_attention else None

    def __call__(
        self, attn, hidden_states, grid_size, conditioning=None, image_rotary_emb=None, decay_scale=None, places=None
    ):
        if places is not None:
            raise ValueError("Decays are recorded of whole grids, without a route of tokens.")
        if len(hidden_states) != 1:
            raise ValueError(f"Decays are recorded of one image at a time, not of {len(hidden_states)}.")
        self.passes, self.attn, self.tokens = 0, attn, hidden_states.shape[1]
        output = super().__call__(attn, hidden_states, grid_size, conditioning, image_rotary_emb, decay_scale)
        gate, alpha = (x.detach().float() for x in attn.gate(hidden_states, conditioning))
        gate = gate[0].expand(-1, self.tokens)[:, attn.num_registers :]
        record = BlockDecay(
            self.block, gate, alpha, tuple(grid_size), attn.spatial_decay, attn.decomposed, self.attention
        )
        self.records.append(record)
        return output

    def _attend(self, query, key, value, decay, scale):
        if self.passes == 0:
            lines, heads = value.shape[:2]
            marks = torch.eye(self.tokens, dtype=value.dtype, device=value.device).view(lines, 1, -1, self.tokens)
            value = torch.cat([value, marks.expand(-1, heads, -1, -1)], dim=-1)
        self.passes += 1
        output = BACKENDS["reference"](query, key, value, decay, scale)
        if self.attn.decomposed and self.passes == 1:
            return output
        output, attention = output.split([self.attn.head_dim, self.tokens], dim=-1)
        # (columns, heads, rows, tokens), or 1 for columns and tokens for rows
        attention = attention.permute(1, 2, 0, 3).flatten(1, 2).detach().float()
        first = self.attn.num_registers  # tokens that are on no grid
        self.attention = attention[:, first:, first:]
        return output
