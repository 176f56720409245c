"""The flow averaged over an interval of time, with which one step, or a few, are enough to sample."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.tensor import DTensor

from ...attention_processor import named_backends
from ...utils.seeding import Draws
from .flow import FlowObjective
from .objective import Noised

#: What keeps the adaptive weight of small errors finite (c of MeanFlow, arXiv 2505.13447).
ADAPTIVE_EPS = 1e-3


class MeanFlowObjective(FlowObjective):
    """Improved MeanFlow (arXiv 2512.02012): the model learns u(z, r, t), the flow averaged from time r to time t.

    It is the average if V = u + (t - r) du/dt is the flow v(z, t), where d/dt moves z along v. So V is regressed on
    noise - x, as the prediction is in flow matching, with v = u(z, t, t) and without gradients through v and du/dt.
    As always t is sigma, and the model's timesteps are 1000 t and 1000 r.
    """

    options: tuple[str, ...] = (
        *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "time_shift"),
        *("meanflow_ratio", "meanflow_adaptive_power", "meanflow_guidance_scale"),
    )
    sampling: Mapping[str, Any] = MappingProxyType({"guidance_scale": 1.0, "num_inference_steps": 1})

    def model_config(self, in_channels: int) -> dict[str, Any]:
        """Return what lets the model know the interval, and keeps its derivative by t small."""
        return {"interval_conditioning": True, "timestep_scale": 1 / self.num_train_timesteps}

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that this objective cannot train.

        Raises:
            ValueError: If an attention backend without forward-mode derivatives was named, attention skips tokens, or
                guidance has no null class; names both.
        """
        backends = named_backends(model) - {"reference"}
        if backends:
            raise ValueError(
                f"objective meanflow needs derivatives in forward mode, which the attention_backend "
                f"{', '.join(sorted(backends))} does not have: name reference, or none."
            )
        if any(getattr(getattr(module, "processor", None), "prune_eps", 0) for module in model.modules()):
            raise ValueError("objective meanflow needs derivatives of all of attention: set attention_prune_eps to 0.")
        if self.args.meanflow_guidance_scale != 1 and not model.config.class_dropout_prob:
            raise ValueError("meanflow_guidance_scale needs the null class: set class_dropout_prob above 0.")

    def with_intervals(self, noised: Noised, draws: Draws) -> Noised:
        """Draw a second time for each image of `noised`: the later one is t, and the earlier r.

        For a share of the images r is t instead: evenly spaced ones, so that the number is known to the host.
        """
        sigma = noised.timestep / self.num_train_timesteps  # (B,)
        other, ratio = self.times(draws), self.args.meanflow_ratio
        later, earlier = torch.maximum(sigma, other), torch.minimum(sigma, other)
        averaged = draws.take(lambda images, _: torch.arange(images + 1).mul(1 - ratio).floor().diff() > 0)  # (B,)
        rows = averaged.nonzero().flatten().to(later.device, non_blocking=True)
        end = later.index_copy(0, rows, earlier[rows])
        step = (later - sigma).reshape(-1, *[1] * (noised.sample.ndim - 1))  # (B, 1, 1, 1)
        return noised._replace(
            sample=noised.sample + step * noised.target,
            timestep=later * self.num_train_timesteps,
            end_timestep=end * self.num_train_timesteps,
            averaged=rows,
        )

    @torch.no_grad()
    def guided(self, model: nn.Module, noised: Noised, class_labels: torch.Tensor, dropped: torch.Tensor) -> Noised:
        """Replace the targets by those of the guided flow, w (noise - x) + (1 - w) v of the null class.

        Those of dropped labels stay, as in MeanFlow.
        """
        scale = self.args.meanflow_guidance_scale
        if scale == 1:
            return noised
        null = _velocity(model, noised.sample, noised.timestep, class_labels, torch.ones_like(dropped))
        keeps = dropped.reshape(-1, *[1] * (null.ndim - 1))  # (B, 1, 1, 1)
        return noised._replace(target=noised.target.where(keeps, scale * noised.target + (1 - scale) * null))

    @torch.no_grad()
    def correction(
        self, model: nn.Module, noised: Noised, class_labels: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        """Return V - u = (t - r) du/dt, shape (batch, channels, height, width); 0 where r = t.

        Args:
            model: The model, which may be compiled and wrapped; its wrappers and compiled code are left out.
            noised: What `with_intervals` returns.
            class_labels: Shape (batch,).
            dropped: Which labels the null class replaces, shape (batch,).

        Raises:
            ValueError: If the parameters are sharded.
        """
        correction, rows = torch.zeros_like(noised.target), noised.averaged
        assert rows is not None and noised.end_timestep is not None  # noqa: PT018
        if len(rows):
            inputs = (noised.sample, noised.timestep, noised.end_timestep, class_labels, dropped)
            sample, timestep, end_timestep, class_labels, dropped = (x[rows] for x in inputs)
            velocity = _velocity(model, sample, timestep, class_labels, dropped)
            derivative = torch.func.jvp(
                lambda sample, timestep: _velocity(model, sample, timestep, class_labels, dropped, end_timestep),
                (sample, timestep),
                (velocity, torch.full_like(timestep, self.num_train_timesteps)),
            )[1]
            length = (timestep - end_timestep) / self.num_train_timesteps
            correction[rows] = length.reshape(-1, *[1] * (sample.ndim - 1)) * derivative
        return correction

    def adaptive_weight(self, error: torch.Tensor) -> torch.Tensor:
        """Return 1 / (error + c)^p of the errors of images, shape (batch,), without gradients."""
        return (error.detach() + ADAPTIVE_EPS) ** -self.args.meanflow_adaptive_power


def _velocity(model, sample, timestep, class_labels, dropped, end_timestep=None):
    """Predict without what wraps the model for passes with gradients, and without compiled code."""
    network = extract_model_from_parallel(model)
    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        raise ValueError("objective meanflow takes derivatives of whole parameters, which FSDP2 shards: use DDP.")
    with torch.compiler.set_stance("force_eager"):
        output = network(
            *(sample, timestep, class_labels),
            force_drop_ids=dropped,
            end_timestep=timestep if end_timestep is None else end_timestep,
            return_dict=False,
        )
    return output[0].to(sample.dtype)  # (B, C, H, W)
