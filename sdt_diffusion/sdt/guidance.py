"""Guidance: what predictions are pushed away from, how, and at which noise levels.

    pipe.guider = SDTGuidance(1.5, guidance_interval=(0.2, 0.8))            # classifier-free, where sigma allows
    pipe.guider = SDTGuidance.from_kind("apg", guidance_scale=3)            # projected
    pipe.guider = SDTGuidance.from_kind("decay", guidance_scale=2)          # away from a more near-sighted self
    pipe.guider = SDTGuidance.from_kind("autoguidance", guidance_scale=2)   # away from pipe.guide_transformer

Sources: classifier-free guidance, arXiv 2207.12598; limited interval, arXiv 2404.07724; autoguidance, arXiv
2406.02507; adaptive projected guidance (APG), arXiv 2410.02416; rescaled guidance, arXiv 2305.08891. Decay guidance is
this project's.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.schedulers import SchedulerMixin

from ..utils.ranges import Range, check_value
from .schedulers import GUIDANCE, is_flow

#: Kinds of guidance -> what they set of `SDTGuidance`, for `from_kind` and for command lines.
GUIDANCE_KINDS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "cfg_3channels": {"guided_channels": 3},  # facebookresearch/DiT's, with which its published FIDs were computed
    "apg": {"parallel_weight": 0.0, "momentum": -0.5},
    "autoguidance": {"null_class": False, "guide_model": True},
    "decay": {"null_class": False, "decay_factor": 4.0},
}
#: Values that the numbers may have.
RESCALE, DECAY_FACTORS, CHANNELS = Range(0, 1), Range(0, 1e6), Range(1, 8192)
PARALLEL, MOMENTUM, THRESHOLD = Range(-1000, 1000), Range(-1, 1, False, False), Range(0, 1e6)
CONTRAST = Range(0, 1, with_most=False)
#: Where diffusers says, whenever a guider is made, that guiders are experimental.
GUIDERS_LOGGER = logging.getLogger("diffusers.guiders.guider_utils")


class SDTGuidance(BaseGuidance):
    """Pushes the prediction D of a model away from a weaker one: D_weak + w (D - D_weak).

    The weaker prediction is that of the null class (classifier-free guidance), of another model (autoguidance), or of
    the same model with a stronger decay (decay guidance), or of the null class in one of these two. Both predictions
    come from one batched forward pass, except with another model. Where no guidance is due, none is computed.

    Args:
        guidance_scale: The scale w; 1 or less for no guidance.
        null_class: Whether the weaker prediction is of the null class instead of the image's.
        guide_model: Whether it comes from the pipeline's `guide_transformer`.
        decay_factor: Factor of its decay; more than 1 makes it near-sighted. `None` for no decay guidance.
        far_heads_only: Whether the factor applies only to the half of the heads that starts far-sighted, which a large
            factor cuts: they attend to their own patch alone.
        guidance_interval: Least and greatest noise level at which to guide, both included; everywhere by default.
        interval_unit: "sigma", which is that of diffusers' schedulers: noise over image, sqrt(1 / alpha_bar - 1), for
            diffusion models, and the share of noise, 0 to 1, for flows; or "timestep", 0 to 1000.
        guided_channels: Guide only so many channels, the first; all by default.
        guidance_rescale: Share, 0 to 1, to which a guided prediction gets back the unguided one's standard deviation.
        parallel_weight: Weight of the part of D - D_weak that is parallel to D (eta of APG), which saturates images.
            This, `momentum` and `norm_threshold` apply to predictions of the clean image.
        momentum: Weight of the earlier steps' differences in D - D_weak (beta of APG, which takes -0.5).
        norm_threshold: Largest norm of D - D_weak in a sample (r of APG); 0 for any.
        contrastive_weight: Weight w with which contrastive flow matching trained the model, whose prediction u of a
            class is then guided as (1 - w) u - w mean, the flow itself; 0 to guide u as it is (arXiv 2506.05350).
        contrastive_mean: Mean of what the model learned to make, a number for each channel, or shape (channels,
            height, width), nested.

    Raises:
        ValueError: If a number is out of its range, or options contradict each other.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 (diffusers' name and type)

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.5,
        null_class: bool = True,
        guide_model: bool = False,
        decay_factor: float | None = None,
        far_heads_only: bool = False,
        guidance_interval: Sequence[float] | None = None,
        interval_unit: Literal["sigma", "timestep"] = "sigma",
        guided_channels: int | None = None,
        guidance_rescale: float = 0.0,
        parallel_weight: float = 1.0,
        momentum: float = 0.0,
        norm_threshold: float = 0.0,
        contrastive_weight: float = 0.0,
        contrastive_mean: Sequence[float] | Sequence[Sequence[Sequence[float]]] | None = None,
    ):
        level = GUIDERS_LOGGER.level
        GUIDERS_LOGGER.setLevel(logging.ERROR)
        try:
            super().__init__()
        finally:
            GUIDERS_LOGGER.setLevel(level)
        _check_config(self.config)
        self._scheduler: SchedulerMixin | None = None
        self._latents: torch.Tensor | None = None
        self._differences: MomentumBuffer | None = None

    @classmethod
    def from_kind(cls, kind: str, **options: Any) -> "SDTGuidance":
        """Make guidance of a named kind.

        Args:
            kind: A key of `GUIDANCE_KINDS`.
            **options: Arguments of `SDTGuidance` besides those that the kind sets, or in their place.

        Raises:
            ValueError: If the kind is unknown, or the options do not fit.
        """
        if kind not in GUIDANCE_KINDS:
            raise ValueError(f"Unknown kind of guidance {kind!r}: choose one of {', '.join(GUIDANCE_KINDS)}.")
        return cls(**{**GUIDANCE_KINDS[kind], **options})

    @property
    def guidance_scale(self) -> float:
        """The scale, which may be set; it is saved with the rest."""
        return self.config.guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        check_value("guidance_scale", scale, (float,), GUIDANCE)
        self.register_to_config(guidance_scale=scale)

    @property
    def is_conditional(self) -> bool:
        """Whether the next prediction is the one to be guided; diffusers' modular pipelines ask."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """Number of predictions that this step needs: 2 where it is guided, else 1."""
        return 2 if self._enabled and self.guidance_scale > 1 and self.guides_at(self._timestep) else 1

    def check_interval(self, scheduler: SchedulerMixin) -> None:
        """Refuse an interval outside the noise levels of a scheduler.

        Raises:
            ValueError: Names the interval and the greatest noise level.
        """
        interval, unit = self.config.guidance_interval, self.config.interval_unit
        if interval is None:
            return
        steps = scheduler.config.num_train_timesteps
        most = steps if unit == "timestep" else sigma_at(scheduler, steps)
        # The greatest sigma of a diffusion schedule is not round: take what is a little more for it.
        if interval[1] > 1.01 * most:
            raise ValueError(
                f"guidance_interval {tuple(interval)} lies outside the schedule: the {unit} of "
                f"{type(scheduler).__name__} is {most:.4g} at most."
            )

    def start_run(self, scheduler: SchedulerMixin, timesteps: Sequence[float]) -> None:
        """Get ready for a run of the scheduler.

        Args:
            scheduler: The pipeline's.
            timesteps: All of the run.

        Raises:
            ValueError: If the interval holds none of them, or `contrastive_weight` is for another kind of model.
        """
        if self.config.contrastive_weight and not is_flow(scheduler):
            raise ValueError(f"contrastive_weight is for flows, and {type(scheduler).__name__} samples none.")
        self._scheduler, self._differences = scheduler, MomentumBuffer(self.config.momentum)
        interval, unit = self.config.guidance_interval, self.config.interval_unit
        if interval is not None and not any(map(self.guides_at, timesteps)):
            levels = sorted(t if unit == "timestep" else sigma_at(scheduler, t) for t in timesteps)
            raise ValueError(
                f"guidance_interval {tuple(interval)} holds none of the {len(levels)} steps, whose {unit} is between "
                f"{levels[0]:.4g} and {levels[-1]:.4g}: nothing would be guided."
            )

    def guides_at(self, timestep: torch.Tensor | float | None) -> bool:
        """Return whether a timestep lies in the interval."""
        interval = self.config.guidance_interval
        if interval is None or timestep is None or self._scheduler is None:
            return True
        level = float(timestep)
        if self.config.interval_unit == "sigma":
            level = sigma_at(self._scheduler, level)
        return interval[0] <= level <= interval[1]

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """Return the inputs of the one or two predictions.

        Args:
            data: `latents` of shape (batch, channels, height, width), and `class_labels`: the images' labels and as
                many of the null class, each of shape (batch,).
        """
        labels, null_labels = data["class_labels"]
        self._latents = data["latents"]
        data = {**data, "class_labels": (labels, null_labels if self.config.null_class else labels)}
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, index, name) for index, name in enumerate(names)]

    def decay_scale(self, config: Any) -> torch.Tensor | None:
        """Return the factors of the decay in the weaker prediction, shape (heads,); `None` for the model's own decay.

        Args:
            config: That of the transformer.
        """
        if self.config.decay_factor is None:
            return None
        heads = config.num_attention_heads
        factors = torch.full((heads,), float(self.config.decay_factor))
        if self.config.far_heads_only:
            # The exponents, of which the largest decay the least, grow with the head, unless their range is negative.
            near = slice(heads - heads // 2, None) if config.decay_heads_range < 0 else slice(0, heads // 2)
            factors[near] = 1
        return factors

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """Combine the two predictions, each of shape (batch, channels, height, width); one is returned as it is."""
        if pred_uncond is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        if self.config.contrastive_weight:
            pred_cond = self._without_contrast(pred_cond)
        channels = self.config.guided_channels
        cond, weak = pred_cond[:, :channels], pred_uncond[:, :channels]
        guided = self._projected(cond, weak) if self._is_projected else weak + self.guidance_scale * (cond - weak)
        if self.config.guidance_rescale:
            guided = _rescaled(guided, cond, self.config.guidance_rescale)
        if channels is not None:
            guided = torch.cat([guided, pred_cond[:, channels:]], dim=1)
        return GuiderOutput(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _without_contrast(self, pred_cond: torch.Tensor) -> torch.Tensor:
        """Return v of the prediction (v - w m) / (1 - w), where m is the mean of noise - x, minus that of x."""
        weight, mean = self.config.contrastive_weight, torch.tensor(self.config.contrastive_mean).to(pred_cond)
        mean = mean[:, None, None] if mean.ndim == 1 else mean  # (C, 1, 1) or (C, H, W)
        if mean.shape[0] != pred_cond.shape[1] or mean.shape[1:] not in ((1, 1), pred_cond.shape[2:]):
            raise ValueError(
                f"contrastive_mean of shape {tuple(mean.shape)} does not fit predictions of shape "
                f"{tuple(pred_cond.shape[1:])}."
            )
        return (1 - weight) * pred_cond - weight * mean

    def describe(self) -> str:
        """Return the options that differ from plain classifier-free guidance, in words; empty if none does."""
        config, parts = self.config, []
        if config.guide_model:
            parts.append("autoguidance")
        if config.decay_factor is not None:
            heads = " of the far heads" if config.far_heads_only else ""
            parts.append(f"decay{heads} times {config.decay_factor:g}")
        if parts and config.null_class:
            parts.append("of the null class")
        if config.guided_channels is not None:
            parts.append(f"of {config.guided_channels} channels")
        if self._is_projected:
            names = ("parallel_weight", "momentum", "norm_threshold")
            parts.append(f"projected ({', '.join(f'{name} {config[name]:g}' for name in names)})")
        if config.contrastive_weight:
            parts.append(f"without contrast {config.contrastive_weight:g}")
        if config.guidance_rescale:
            parts.append(f"rescaled {config.guidance_rescale:g}")
        if config.guidance_interval is not None:
            low, high = config.guidance_interval
            parts.append(f"at {config.interval_unit} {low:g} to {high:g}")
        return ", ".join(parts)

    @property
    def _is_projected(self) -> bool:
        return (self.config.parallel_weight, self.config.momentum, self.config.norm_threshold) != (1, 0, 0)

    def _projected(self, cond: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
        """Guide by APG, which works on the clean images x = offset + factor * prediction."""
        if self._scheduler is None or self._latents is None or self._timestep is None:
            raise ValueError("Projected guidance needs `start_run`, `set_state` and `prepare_inputs` first.")
        on_latents, factor = clean_image_of(self._scheduler, float(self._timestep))
        offset = on_latents * self._latents[:, : cond.shape[1]].to(cond.dtype)
        clean = offset + factor * cond
        guided = normalized_guidance(
            clean,
            offset + factor * weak,
            self.guidance_scale - 1,
            self._differences,
            self.config.parallel_weight,
            self.config.norm_threshold,
            use_original_formulation=True,  # D + (w - 1) update, the paper's; diffusers' own is not D at w = 1
        )
        return cond + (guided - clean) / factor


def sigma_at(scheduler: SchedulerMixin, timestep: float) -> float:
    """Return the noise level at a timestep, in the unit of diffusers' schedulers.

    The share of noise, 0 to 1, for flows; else the ratio of noise to image, between the steps of training interpolated
    as diffusers does.

    Raises:
        ValueError: If the scheduler is neither of a flow nor of a DDPM schedule.
    """
    if is_flow(scheduler):
        return timestep / scheduler.config.num_train_timesteps
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"The noise levels of {type(scheduler).__name__} are not known here: choose another scheduler."
        )
    alpha_bar = scheduler.alphas_cumprod.double().cpu().numpy()
    with np.errstate(divide="ignore"):  # schedules that end at pure noise
        sigmas = np.sqrt(1 / alpha_bar - 1)
    return float(np.interp(timestep, np.arange(len(sigmas)), sigmas))


def clean_image_of(scheduler: SchedulerMixin, timestep: float) -> tuple[float, float]:
    """Return the factors of the latents and of the prediction whose sum is the clean image.

    The latents are what the model sees: a x + s noise with a = 1 - s for flows, a^2 + s^2 = 1 else.
    """
    sigma = sigma_at(scheduler, timestep)
    if is_flow(scheduler):
        return 1.0, -sigma  # flow = noise - x
    a = 1 / (1 + sigma**2) ** 0.5
    s = (1 - a**2) ** 0.5  # at pure noise, sigma is infinite
    if scheduler.config.prediction_type == "epsilon":
        return 1 / a, -s / a
    return (a, -s) if scheduler.config.prediction_type == "v_prediction" else (0.0, 1.0)


def _rescaled(guided: torch.Tensor, cond: torch.Tensor, share: float) -> torch.Tensor:
    """Give guided predictions back a share of the unguided ones' deviation; constant ones, without any, stay."""
    dims = tuple(range(1, guided.ndim))
    deviation = guided.std(dim=dims, keepdim=True)  # (B, 1, 1, 1)
    factor = cond.std(dim=dims, keepdim=True) / deviation
    return guided * torch.where(deviation > 0, share * factor + 1 - share, 1.0)


def _check_config(config: Any) -> None:
    for name, kind, allowed in (
        ("guidance_scale", float, GUIDANCE),
        ("decay_factor", float, DECAY_FACTORS),
        ("guided_channels", int, CHANNELS),
        ("guidance_rescale", float, RESCALE),
        ("parallel_weight", float, PARALLEL),
        ("momentum", float, MOMENTUM),
        ("norm_threshold", float, THRESHOLD),
        ("contrastive_weight", float, CONTRAST),
    ):
        if not (config[name] is None and name in ("decay_factor", "guided_channels")):
            check_value(name, config[name], (kind,), allowed)
    for name in ("null_class", "guide_model", "far_heads_only"):
        if not isinstance(config[name], bool):
            raise ValueError(f"{name} must be true or false, not {config[name]!r}.")
    check_value("interval_unit", config.interval_unit, (Literal["sigma", "timestep"],))
    interval = config.guidance_interval
    if interval is not None:
        if not isinstance(interval, (list, tuple)) or len(interval) != 2:
            raise ValueError(f"guidance_interval must be two numbers, the least and the greatest, not {interval!r}.")
        for level in interval:
            check_value("guidance_interval", level, (float,), Range(0, 1e6))
        if interval[0] >= interval[1]:
            raise ValueError(f"guidance_interval must be two numbers, the lower one first, not {tuple(interval)}.")
    if config.guide_model and config.decay_factor is not None:
        raise ValueError("guide_model and decay_factor contradict each other: the weaker prediction is that of one.")
    if config.far_heads_only and config.decay_factor is None:
        raise ValueError("far_heads_only is for decay guidance: give a decay_factor.")
    _check_contrast(config)
    if not (config.null_class or config.guide_model or config.decay_factor is not None):
        raise ValueError("Nothing makes the weaker prediction weaker: set null_class, guide_model or decay_factor.")


def _check_contrast(config: Any) -> None:
    weight, mean = config.contrastive_weight, config.contrastive_mean
    if bool(weight) != (mean is not None):
        raise ValueError("contrastive_weight and contrastive_mean need each other: give both, or none.")
    if weight and (config.guide_model or config.decay_factor is not None):
        raise ValueError(
            "contrastive_weight is for guidance away from the null class, which has no contrast, and not for "
            "guide_model or decay_factor."
        )
    if mean is not None:
        try:
            values = torch.tensor(mean, dtype=torch.float64)
        except (TypeError, ValueError):
            values = torch.full((), torch.nan)
        if values.ndim not in (1, 3) or not values.isfinite().all():
            raise ValueError(
                "contrastive_mean must be finite numbers, one for each channel or of shape (channels, height, width)."
            )
