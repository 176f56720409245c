"""The loss that training minimizes."""

from collections.abc import Callable

import torch
from accelerate.utils import reduce

from ...utils.ranges import Range, check_number, check_value
from ...utils.seeding import Draws
from .objective import Noised, Objective


class DiffusionLoss:
    """Weighted mean squared error of a model's prediction on freshly noised batches, in fp32.

    Args:
        objective: What to predict.
        class_dropout_prob: Fraction of the labels that the null class replaces, for classifier-free guidance.
        clean_of: Function of (batch, draws) that gives what the model learns to make, such as
            `TrainingData.clean`; the batch itself by default.
        num_buckets: Ranges of timesteps whose errors are logged.
    """

    def __init__(
        self,
        objective: Objective,
        class_dropout_prob: float = 0.0,
        clean_of: Callable[[torch.Tensor, Draws], torch.Tensor] | None = None,
        num_buckets: int = 10,
    ):
        check_number("class_dropout_prob", class_dropout_prob, Range(0, 1))
        check_value("num_buckets", num_buckets, (int,), Range(1, objective.num_train_timesteps))
        self.objective, self.class_dropout_prob, self.num_buckets = objective, class_dropout_prob, num_buckets
        self.clean_of = clean_of or (lambda batch, draws: batch)
        self._sums = torch.zeros(2, num_buckets)  # of errors, and of images

    def __call__(
        self, model: torch.nn.Module, batch: torch.Tensor, class_labels: torch.Tensor, draws: Draws
    ) -> torch.Tensor:
        """Return the loss of a batch: the weighted error of `errors`, and that of further channels."""
        noised, error, prediction = self._predict(model, batch, class_labels, draws, self.class_dropout_prob)
        self._count(noised.timestep, error.detach())
        loss = (noised.weight * error).mean()
        if noised.further_loss is not None:
            channels = noised.target.shape[1]
            # The variance learns from the bound, and the prediction, as without the variance, from its error.
            loss = loss + noised.further_loss(prediction[:, :channels].detach(), prediction[:, channels:]).mean()
        return loss

    def errors(
        self,
        model: torch.nn.Module,
        batch: torch.Tensor,
        class_labels: torch.Tensor,
        draws: Draws,
        class_dropout_prob: float = 0.0,
    ) -> tuple[Noised, torch.Tensor]:
        """Noise a batch and compare the model's prediction with the target.

        Returns:
            The noised batch, and the mean squared error of each image, shape (batch,), unweighted.

        Raises:
            ValueError: If the model predicts another shape than the target's.
        """
        return self._predict(model, batch, class_labels, draws, class_dropout_prob)[:2]

    def _predict(self, model, batch, class_labels, draws, class_dropout_prob):
        """Return the noised batch, the error of each image, shape (batch,), and the prediction."""
        noised = self.objective.noised(self.clean_of(batch, draws), draws)
        dropped = draws.uniform() < class_dropout_prob
        prediction = model(noised.sample, noised.timestep, class_labels, force_drop_ids=dropped, return_dict=False)[0]
        batch_size, channels, *sides = noised.target.shape
        expected = (batch_size, channels * (1 if noised.further_loss is None else 2), *sides)
        if prediction.shape != expected:
            raise ValueError(
                f"The model predicts {tuple(prediction.shape)}, but the target is {expected}: training needs "
                "out_channels equal to in_channels, or twice that with learn_sigma."
            )
        difference = prediction[:, :channels].float() - noised.target.float()  # (B, C, H, W)
        return noised, difference.square().flatten(1).mean(dim=1), prediction

    def pop_values(self) -> dict[str, float]:
        """Return the mean squared error in each range of timesteps since the last call, over all processes.

        Returns:
            "loss_by_timestep/0000-0099" and so on -> the error; ranges without images are left out.
        """
        errors, images = reduce(self._sums, "sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        edges = [self.objective.num_train_timesteps * i // self.num_buckets for i in range(self.num_buckets + 1)]
        return {
            f"loss_by_timestep/{edges[i]:04d}-{edges[i + 1] - 1:04d}": errors[i] / images[i]
            for i in range(self.num_buckets)
            if images[i]
        }

    def _count(self, timestep, error):
        bucket = (timestep * self.num_buckets / self.objective.num_train_timesteps).long()
        bucket = bucket.clamp(max=self.num_buckets - 1)  # sigma may round up to 1
        self._sums = self._sums.to(error.device)
        finite = error.isfinite()
        self._sums[0].index_add_(0, bucket, error.where(finite, 0))
        self._sums[1].index_add_(0, bucket, finite.float())
