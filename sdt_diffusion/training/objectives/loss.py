"""The loss that training minimizes."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn

from ...utils.ranges import Range, check_number, check_value
from ...utils.seeding import Draws
from .auxiliary import AuxiliaryLoss, Predicted
from .meanflow import MeanFlowObjective
from .objective import Noised, Objective
from .routing import TokenRouting


class DiffusionLoss:
    """Weighted mean squared error of a model's prediction on freshly noised batches, in fp32, and further terms.

    Args:
        objective: What to predict.
        class_dropout_prob: Fraction of the labels that the null class replaces, for classifier-free guidance.
        clean_of: Function of (batch, draws) that gives what the model learns to make, such as
            `TrainingData.clean`; the batch itself by default.
        num_buckets: Ranges of timesteps whose errors are logged.
        auxiliary: Further terms.
        routing: Which tokens skip blocks in training; none by default.

    Attributes:
        heads: Layers of the terms that a run is to train with the model, by the terms' names.
        teacher: The average of the weights, for terms that need it; to be set when there is a run.
    """

    def __init__(
        self,
        objective: Objective,
        class_dropout_prob: float = 0.0,
        clean_of: Callable[[Any, Draws], torch.Tensor] | None = None,
        num_buckets: int = 10,
        auxiliary: Sequence[AuxiliaryLoss] = (),
        routing: TokenRouting | None = None,
    ):
        check_number("class_dropout_prob", class_dropout_prob, Range(0, 1))
        check_value("num_buckets", num_buckets, (int,), Range(1, objective.num_train_timesteps))
        self.objective, self.class_dropout_prob, self.num_buckets = objective, class_dropout_prob, num_buckets
        self.clean_of = clean_of or (lambda batch, draws: batch)
        self.auxiliary, self.routing = list(auxiliary), routing
        self.teacher: Callable | None = None
        self.heads = nn.ModuleDict({term.name: term.head for term in auxiliary if term.head is not None})
        self._blocks = sorted({block for term in auxiliary for block in term.blocks})
        self._sums = torch.zeros(2, num_buckets + len(auxiliary))  # of errors and further terms, and their numbers

    def __call__(self, model: torch.nn.Module, batch: Any, class_labels: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Return the loss of a batch: the weighted error of `errors`, further terms, and that of further channels."""
        noised, error, prediction, dropped, tokens = self._predict(
            model, batch, class_labels, draws, self.class_dropout_prob, self._blocks, training=True
        )
        weight = noised.weight
        if isinstance(self.objective, MeanFlowObjective):
            weight = weight * self.objective.adaptive_weight(error)
        loss = (weight * error).mean()
        target_prediction = prediction[:, : noised.target.shape[1]]
        predicted = Predicted(batch, noised, target_prediction, class_labels, dropped, tokens, draws, self.teacher)
        terms = [term(predicted) for term in self.auxiliary]
        for term, value in zip(self.auxiliary, terms, strict=True):
            loss = loss if value is None else loss + term.weight * value
        self._count(noised.timestep, error.detach(), terms)
        if noised.further_loss is not None:
            channels = noised.target.shape[1]
            # The variance learns from the bound, and the prediction, as without the variance, from its error.
            loss = loss + noised.further_loss(prediction[:, :channels].detach(), prediction[:, channels:]).mean()
        return loss

    def errors(
        self,
        model: torch.nn.Module,
        batch: Any,
        class_labels: torch.Tensor,
        draws: Draws,
        class_dropout_prob: float = 0.0,
    ) -> tuple[Noised, torch.Tensor]:
        """Noise a batch and compare the model's prediction with the target; a MeanFlow's, with the flow itself.

        Returns:
            The noised batch, and the mean squared error of each image, shape (batch,), unweighted.

        Raises:
            ValueError: If the model predicts another shape than the target's.
        """
        return self._predict(model, batch, class_labels, draws, class_dropout_prob)[:2]

    def _predict(self, model, batch, class_labels, draws, class_dropout_prob, blocks=(), training=False):
        """Return the noised batch, errors of images, the prediction, which labels are dropped, and blocks' tokens."""
        noised = self.objective.noised(self.clean_of(batch, draws), draws)
        mean_flow = self.objective if training and isinstance(self.objective, MeanFlowObjective) else None
        if mean_flow is not None:
            noised = mean_flow.with_intervals(noised, draws)
        dropped = draws.uniform() < class_dropout_prob
        options: dict[str, Any] = {"block_outputs": tuple(blocks)} if blocks else {}
        if training and self.routing is not None:
            options["route"] = self.routing(draws)
        if mean_flow is not None:
            noised = mean_flow.guided(model, noised, class_labels, dropped)
            options["end_timestep"] = noised.end_timestep
        prediction, *rest = model(
            noised.sample, noised.timestep, class_labels, force_drop_ids=dropped, return_dict=False, **options
        )
        tokens = dict(zip(blocks, rest[0], strict=True)) if blocks else {}
        batch_size, channels, *sides = noised.target.shape
        expected = (batch_size, channels * (1 if noised.further_loss is None else 2), *sides)
        if prediction.shape != expected:
            raise ValueError(
                f"The model predicts {tuple(prediction.shape)}, but the target is {expected}: training needs "
                "out_channels equal to in_channels, or twice that with learn_sigma."
            )
        prediction = prediction.float()  # once, so that the terms' gradients are not rounded one by one
        if mean_flow is not None:
            prediction = prediction + mean_flow.correction(model, noised, class_labels, dropped)
        difference = prediction[:, :channels] - noised.target.float()  # (B, C, H, W)
        return noised, difference.square().flatten(1).mean(dim=1), prediction, dropped, tokens

    def pop_values(self) -> dict[str, float]:
        """Return means since the last call, over all processes, of what was finite.

        Returns:
            "loss_by_timestep/0000-0099" and so on -> the mean squared error in that range of timesteps; names of
            further terms -> their value without the weight. What no image or batch has contributed to is left out.
        """
        sums, numbers = reduce(self._sums, "sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        edges = [self.objective.num_train_timesteps * i // self.num_buckets for i in range(self.num_buckets + 1)]
        names = [f"loss_by_timestep/{low:04d}-{high - 1:04d}" for low, high in itertools.pairwise(edges)]
        names += [term.name for term in self.auxiliary]
        return {name: total / number for name, total, number in zip(names, sums, numbers, strict=True) if number}

    def _count(self, timestep, error, terms):
        bucket = (timestep * self.num_buckets / self.objective.num_train_timesteps).long()
        bucket = bucket.clamp(max=self.num_buckets - 1)  # sigma may round up to 1
        rows = torch.arange(self.num_buckets, self._sums.shape[1], device=error.device)
        values = [torch.full_like(error[:1], torch.nan) if term is None else term.detach()[None] for term in terms]
        bucket, error = torch.cat([bucket, rows]), torch.cat([error, *(value.float() for value in values)])
        self._sums = self._sums.to(error.device)
        finite = error.isfinite()
        self._sums[0].index_add_(0, bucket, error.where(finite, 0))
        self._sums[1].index_add_(0, bucket, finite.float())
