"""Further losses, each of which is a term beside the squared error.

Those that compare images with each other do so within fixed groups of consecutive images of a step, which are random
ones, so that any number of processes computes the same.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.seeding import Draws
from .objective import Noised, ObjectiveArguments


class Predicted(NamedTuple):
    """A batch, and what the model made of it.

    Attributes:
        batch: The images as they were loaded, shape (batch, ...), or `ImagesWithFeatures`.
        noised: What the model was given.
        prediction: What it predicts of the target, shape (batch, channels, height, width), fp32.
        class_labels: The labels, shape (batch,).
        dropped: Which of them the null class has replaced, shape (batch,).
        tokens: Index of a block that a loss asks for -> the tokens after it, shape (batch, tokens, width).
        draws: Random numbers.
        teacher: Predicts as the average of the weights does, without gradients; takes what the model takes.
    """

    batch: Any
    noised: Noised
    prediction: torch.Tensor
    class_labels: torch.Tensor
    dropped: torch.Tensor
    tokens: Mapping[int, torch.Tensor]
    draws: Draws
    teacher: Callable | None = None


class AuxiliaryLoss(Protocol):
    """A term of `DiffusionLoss`."""

    @property
    def name(self) -> str:
        """Its name in the log and, for its head, in checkpoints."""

    @property
    def weight(self) -> float:
        """Factor of the term."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the blocks whose tokens it needs."""

    @property
    def head(self) -> nn.Module | None:
        """Layers that are trained with the model for this term alone, and are not saved with it."""

    def __call__(self, predicted: Predicted) -> torch.Tensor | None:
        """Return the mean of the term over a batch, of shape (), without the weight; `None` in a step without it."""


class FeatureSource(Protocol):
    """What gives features to align with, such as `TrainingData`."""

    @property
    def feature_shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels of the features of an image; `None` if there are none."""

    def features(self, batch: Any) -> torch.Tensor:
        """Return the features of a batch as it was loaded, shape (batch, *feature_shape)."""


class DirectionLoss:
    """1 - cos(prediction, target), of the channels at each position (FasterDiT, arXiv 2410.10356, and LightningDiT).

    Args:
        weight: See `AuxiliaryLoss`.
    """

    name, blocks, head = "direction_loss", (), None

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, predicted: Predicted) -> torch.Tensor:
        """Return the mean over images and positions."""
        cosine = F.cosine_similarity(predicted.prediction, predicted.noised.target.float(), dim=1)  # (B, H, W)
        return 1 - cosine.mean()


class ContrastiveLoss:
    """Minus the squared error to the target of another image (contrastive flow matching, arXiv 2506.05350).

    The other image is the neighbor in the batch, which is a random one. With weight w, the minimum is (v - w m) / (1 -
    w), where v is that of flow matching and m the mean of all targets: each class is moved away from the mean, as by
    guidance. Images whose label is dropped have no such term: the null class, from which guidance leads away, stays v.

    Args:
        weight: See `AuxiliaryLoss`.
    """

    name, blocks, head = "contrastive_loss", (), None

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, predicted: Predicted) -> torch.Tensor:
        """Return the mean over images; those whose labels are dropped count as 0."""
        others = groups(predicted.noised.target.float(), 2).flip(1).flatten(0, 1)  # (B, C, H, W)
        error = (predicted.prediction - others).square().flatten(1).mean(dim=1)  # (B,)
        return -error.where(~predicted.dropped, 0).mean()


class DispersiveLoss:
    """log E[exp(-D / temperature)] over all pairs of a group (dispersive loss, arXiv 2506.09027).

    D is the mean squared difference of the tokens of two images after a block, as in the authors' code.

    Args:
        weight: See `AuxiliaryLoss`.
        block: Index of the block.
        temperature: See above.
        num_images: Images of a group.
    """

    name, head = "dispersive_loss", None

    def __init__(self, weight: float, block: int, temperature: float = 0.5, num_images: int = 32):
        self.weight, self.blocks = weight, (block,)
        self.temperature, self.num_images = temperature, num_images

    def __call__(self, predicted: Predicted) -> torch.Tensor:
        """Return the mean over groups."""
        tokens = groups(predicted.tokens[self.blocks[0]].float().flatten(1), self.num_images)  # (groups, n, N*D)
        tokens = tokens - tokens.mean(dim=1, keepdim=True)  # the differences stay, and lose fewer digits below
        inner = tokens @ tokens.mT / tokens.shape[-1]  # (groups, n, n)
        square = inner.diagonal(dim1=1, dim2=2)
        distance = square[:, :, None] + square[:, None] - 2 * inner
        return (-distance / self.temperature).exp().mean(dim=(1, 2)).log().mean()


class SelfAlignmentLoss:
    """Smooth L1 distance of tokens, through a head, to the average's at a later block and less noise.

    This is SRA (arXiv 2505.02831), whose authors' code gives the head and the distance.

    Args:
        weight: See `AuxiliaryLoss`.
        width: Width of the tokens.
        block: Index of the model's block.
        teacher_block: Index of the block of the average of the weights.
        num_train_timesteps: Timestep of pure noise.
        most_time: Part of it by which the average's timestep is smaller, at most.
    """

    name = "self_alignment_loss"
    #: Where the distance turns from squared to absolute.
    beta = 0.05

    def __init__(
        self,
        weight: float,
        width: int,
        block: int,
        teacher_block: int,
        num_train_timesteps: int = 1000,
        most_time: float = 0.2,
    ):
        self.weight, self.blocks, self.teacher_block = weight, (block,), teacher_block
        self.num_train_timesteps, self.most_time = num_train_timesteps, most_time
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def __call__(self, predicted: Predicted) -> torch.Tensor:
        """Return the mean over images, tokens and channels.

        Raises:
            ValueError: If there is no average to align with.
        """
        if predicted.teacher is None:
            raise ValueError("Self-alignment needs a teacher: see training.heads.AverageTeacher.")
        sample, timestep, target, *_ = predicted.noised
        sigma = timestep / self.num_train_timesteps  # (B,)
        earlier = (sigma - self.most_time * predicted.draws.uniform()).clamp(min=0)
        # The same image with the same noise, at another place of its line.
        step = (sigma - earlier).reshape(-1, *[1] * (sample.ndim - 1))  # (B, 1, 1, 1)
        _, (tokens,) = predicted.teacher(
            sample - step * target,
            earlier * self.num_train_timesteps,
            predicted.class_labels,
            force_drop_ids=predicted.dropped,
            block_outputs=(self.teacher_block,),
            return_dict=False,
        )
        aligned = self.head(predicted.tokens[self.blocks[0]])  # (B, N, D)
        return F.smooth_l1_loss(aligned.float(), tokens.float(), beta=self.beta)


class AlignmentLoss:
    """Minus the cosine of a block's tokens, through a head, and an encoder's patch features (REPA, arXiv 2410.06940).

    Args:
        weight: See `AuxiliaryLoss`.
        width: Width of the tokens.
        block: Index of the block.
        grid_size: Rows and columns of the tokens.
        source: Gives the features.
        hidden_width: Width of the head's hidden layers.
        stop_step: Step from which on the term is left out, as HASTE does (arXiv 2505.16792); `None` for never.

    Raises:
        ValueError: If the source has no features.
    """

    name = "alignment_loss"

    def __init__(
        self,
        weight: float,
        width: int,
        block: int,
        grid_size: tuple[int, int],
        source: FeatureSource,
        hidden_width: int = 2048,
        stop_step: int | None = None,
    ):
        if source.feature_shape is None:
            raise ValueError("source has no features to align with.")
        self.weight, self.blocks, self.grid_size = weight, (block,), grid_size
        self.source, self.stop_step = source, stop_step
        widths = (width, hidden_width, hidden_width, source.feature_shape[-1])
        first, second, third = (nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.head = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)

    def __call__(self, predicted: Predicted) -> torch.Tensor | None:
        """Return the mean over images and tokens, -1 to 1."""
        if self.stop_step is not None and predicted.draws.step >= self.stop_step:
            return None
        features = on_grid(self.source.features(predicted.batch).float(), self.grid_size)  # (B, N, D)
        aligned = self.head(predicted.tokens[self.blocks[0]])  # (B, N, D)
        return -F.cosine_similarity(aligned.float(), features, dim=-1).mean()


def on_grid(features: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Return features at the places of a grid's tokens, interpolated, or averaged where the grid is coarser.

    Args:
        features: Shape (batch, height, width, channels).
        grid_size: Rows and columns of the grid.

    Returns:
        Shape (batch, rows * columns, channels).
    """
    if features.shape[1:3] != grid_size:
        channels_first = features.permute(0, 3, 1, 2)
        features = F.interpolate(channels_first, grid_size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    return features.flatten(1, 2)


def groups(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return a batch in groups of consecutive images, shape (groups, size, ...).

    Raises:
        ValueError: If the batch does not divide into groups.
    """
    if len(rows) % size:
        raise ValueError(f"A batch of {len(rows)} images does not divide into groups of {size}.")
    return rows.unflatten(0, (-1, size))


def build_auxiliary_losses(
    args: ObjectiveArguments,
    model: nn.Module,
    train_batch_size: int,
    use_ema: bool = True,
    source: FeatureSource | None = None,
) -> list[AuxiliaryLoss]:
    """Build the terms whose weights are not 0.

    Args:
        args: Their weights and options.
        model: The diffusion transformer.
        train_batch_size: Images of a batch on each process.
        use_ema: Whether the run averages the weights.
        source: What gives features to align with, if there are any.

    Raises:
        ValueError: If an option does not fit the model, the batch, or a run without an average; names both.
    """
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    losses: list[AuxiliaryLoss] = []
    if args.direction_loss_weight:
        if config.in_channels == 1:
            raise ValueError("direction_loss_weight needs images of several channels, not in_channels 1.")
        losses.append(DirectionLoss(args.direction_loss_weight))
    if args.contrastive_weight:
        _check_divides("contrastive_weight, for pairs of images,", 2, train_batch_size)
        losses.append(ContrastiveLoss(args.contrastive_weight))
    if args.dispersive_weight:
        _check_divides("dispersive_images", args.dispersive_images, train_batch_size)
        block = _block(args, "dispersive_block", 0.25, config.num_layers)
        options = (args.dispersive_temperature, args.dispersive_images)
        losses.append(DispersiveLoss(args.dispersive_weight, block, *options))
    if args.self_alignment_weight:
        if not use_ema:
            raise ValueError("self_alignment_weight needs use_ema, whose average it aligns with.")
        block = _block(args, "self_alignment_block", 0.3, config.num_layers)
        later = _block(args, "self_alignment_teacher_block", 0.7, config.num_layers)
        if block > later:
            raise ValueError(f"self_alignment_block {block + 1} is beyond self_alignment_teacher_block {later + 1}.")
        weight, most_time = args.self_alignment_weight, args.self_alignment_time
        losses.append(SelfAlignmentLoss(weight, width, block, later, most_time=most_time))
    if source is not None and source.feature_shape is not None:
        block = _block(args, "alignment_block", 8 / 28, config.num_layers)
        sides = [config.sample_size] * 2 if isinstance(config.sample_size, int) else config.sample_size
        rows, columns = (side // config.patch_size for side in sides)
        weight, hidden, stop = args.alignment_weight, args.alignment_width, args.alignment_stop_step
        losses.append(AlignmentLoss(weight, width, block, (rows, columns), source, hidden, stop))
    else:
        for f in fields(args):
            if f.name.startswith("alignment_") and getattr(args, f.name) != f.default:
                raise ValueError(f"{f.name} needs alignment_model.")
    return losses


def _check_divides(name: str, size: int, train_batch_size: int) -> None:
    if train_batch_size % size:
        raise ValueError(f"{name} needs a train_batch_size that is a multiple of {size}, not {train_batch_size}.")


def _block(args: ObjectiveArguments, name: str, share: float, depth: int) -> int:
    """Return the index of the block after which `name` asks for the tokens."""
    blocks = getattr(args, name) or max(1, round(share * depth))
    if blocks > depth:
        raise ValueError(f"{name} {blocks} is beyond the model's num_layers, {depth}.")
    return blocks - 1
