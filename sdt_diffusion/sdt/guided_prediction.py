"""Predict with guidance: one batched forward pass for both predictions, and what parts make a pipeline together."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FasterCacheConfig, FlowMatchEulerDiscreteScheduler, PyramidAttentionBroadcastConfig
from diffusers.guiders import BaseGuidance
from diffusers.schedulers import SchedulerMixin

from ..utils.reading import shortened
from .caching import check_single_batch
from .guidance import GUIDANCE_KINDS, SDTGuidance
from .schedulers import is_flow
from .vae import check_normalization

#: Caches of diffusers that expect the same batch at all steps.
WHOLE_RUN_CACHES = (FasterCacheConfig, PyramidAttentionBroadcastConfig)


def predict(
    guider: BaseGuidance,
    transformer: Any,
    guide_transformer: Any,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    class_labels: torch.Tensor,
    end_timestep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Predict at a timestep, guided where guidance is due.

    Args:
        guider: The guidance, in the state of the step; at a scale of 1 or less there is none.
        transformer: The model to guide.
        guide_transformer: The weaker model of autoguidance.
        latents: What the model sees, shape (batch, channels, height, width).
        timestep: A scalar.
        class_labels: Shape (batch,).
        end_timestep: Where the step ends, a scalar, for models that know it; see `step_ends`.

    Returns:
        The prediction in fp32, shape (batch, out_channels, height, width). A learned variance, which is the second
        half of twice as many channels, is the unguided one.
    """
    kwargs = {} if end_timestep is None else {"end_timestep": end_timestep.to(latents.device)}
    null_labels = torch.full_like(class_labels, transformer.config.num_classes)
    branches = guider.prepare_inputs({"latents": latents, "class_labels": (class_labels, null_labels)})
    if len(branches) == 1 or guider.guidance_scale <= 1:  # guiders of diffusers interpolate below 1
        check_single_batch(transformer)
        with transformer.cache_context("cond"):
            return _run(transformer, latents, timestep, class_labels, **kwargs)

    options = guider.config if isinstance(guider, SDTGuidance) else {}
    weak_labels = branches[1].class_labels
    if options.get("guide_model"):
        check_single_batch(transformer)
        with transformer.cache_context("cond"):
            cond = _run(transformer, latents, timestep, class_labels, **kwargs)
        with guide_transformer.cache_context("cond"):
            weak = _run(guide_transformer, latents, timestep, weak_labels, **kwargs)
    else:
        if options.get("decay_factor") is not None:
            factors = guider.decay_scale(transformer.config).to(latents.device)  # (h,)
            both = torch.stack([factors, torch.ones_like(factors)])  # (2, h)
            kwargs["decay_scale"] = both.repeat_interleave(len(latents), dim=0)  # (2B, h)
        # The weaker one comes first: diffusers' FasterCache leaves out the first half of a batch.
        labels = torch.cat([weak_labels, class_labels])  # (2B,)
        with transformer.cache_context("cond_uncond"):
            weak, cond = _run(transformer, torch.cat([latents, latents]), timestep, labels, **kwargs).chunk(2)
    channels = latents.shape[1]
    for branch, prediction in zip(branches, (cond, weak), strict=True):
        branch.noise_pred = prediction[:, :channels]
    return torch.cat([guider(branches).pred, cond[:, channels:]], dim=1)  # (B, C or 2C, H, W)


def _run(model, latents, timestep, class_labels, **kwargs):
    # One timestep per sample: a scalar from the scheduler would make compiled models specialize on it.
    timestep = timestep.to(latents.device).expand(latents.shape[0])
    if "end_timestep" in kwargs:
        kwargs["end_timestep"] = kwargs["end_timestep"].expand(latents.shape[0])
    # By names, as diffusers' caches want it.
    inputs = {"hidden_states": latents.to(model.dtype), "timestep": timestep, "class_labels": class_labels, **kwargs}
    return model(**inputs, return_dict=False)[0].float()


def check_guidance(guider: Any, transformer: Any, guide_transformer: Any, scale: float = 0) -> None:
    """Refuse guidance that the networks cannot give.

    Args:
        guider: `SDTGuidance`, or a guider of diffusers that changes no model.
        transformer: The model to guide.
        guide_transformer: The weaker model of autoguidance, or `None`.
        scale: Scale of the guidance; at 1 or less there is none.

    Raises:
        ValueError: Names what does not fit, and what to do.
    """
    if not isinstance(guider, BaseGuidance) or not hasattr(guider, "guidance_scale"):
        raise ValueError(f"guider must be an SDTGuidance or a guider of diffusers, not a {type(guider).__name__}.")
    if type(guider).prepare_models is not BaseGuidance.prepare_models:
        raise ValueError(
            f"{type(guider).__name__} changes the model between two forward passes, which SDTPipeline does not: use "
            f"an SDTGuidance ({', '.join(GUIDANCE_KINDS)})."
        )
    options = guider.config if isinstance(guider, SDTGuidance) else {}
    guide_model, decay_factor = options.get("guide_model", False), options.get("decay_factor")
    channels = transformer.config.in_channels
    if guide_transformer is not None and not guide_model:
        raise ValueError(
            "guide_transformer is for autoguidance, but the guider does not use it: set guider to "
            "SDTGuidance.from_kind('autoguidance'), or guide_transformer to None."
        )
    if guide_model:
        if guide_transformer is None:
            raise ValueError("Autoguidance needs a second, weaker model: give the pipeline a guide_transformer.")
        if "num_classes" not in getattr(guide_transformer, "config", ()):
            raise ValueError(
                f"guide_transformer must be a model of classes, not a {type(guide_transformer).__name__}."
            )
        for key in ("in_channels", "sample_size", "num_classes"):
            ours, theirs = transformer.config[key], guide_transformer.config.get(key)
            if _sides(ours) != _sides(theirs):
                raise ValueError(f"guide_transformer has {key} {theirs}, but the transformer has {ours}.")
        if _averages(guide_transformer) != _averages(transformer):
            raise ValueError(
                f"guide_transformer has interval_conditioning {_averages(guide_transformer)}, but the transformer "
                f"{_averages(transformer)}: one predicts a flow, and the other its average."
            )
        if (guide_transformer.config.get("out_channels") or channels) < channels:
            raise ValueError("guide_transformer predicts fewer channels than the transformer takes.")
    if (options.get("guided_channels") or 1) > channels:
        raise ValueError(f"guided_channels {options['guided_channels']} is more than the model's {channels} channels.")
    if options.get("guidance_interval") and isinstance(getattr(transformer, "_cache_config", None), WHOLE_RUN_CACHES):
        raise ValueError(
            f"{type(transformer._cache_config).__name__} needs batches of one size, but steps outside the "
            "guidance_interval have half of it: leave out one of the two."
        )
    if scale <= 1:
        return
    if decay_factor is not None and transformer.config.get("spatial_decay", "none") == "none":
        raise ValueError(
            "Decay guidance strengthens the spatial decay, but the model has none (spatial_decay 'none'): use another "
            "kind of guidance, or guidance_scale 1."
        )
    if options.get("null_class", True):
        model = guide_transformer if guide_model else transformer
        if model.config.get("class_dropout_prob", 0.1) == 0:
            raise ValueError(
                f"guidance_scale {scale:g} needs the null class, which a model of class_dropout_prob 0 has not "
                "learned: use guidance_scale 1, or guidance without the null class (null_class False)."
            )


def _sides(size: Any) -> Any:
    """Return height and width, which a config gives as one number if they are equal; other values as they are."""
    return (size[0] if size[0] == size[1] else tuple(size)) if isinstance(size, (list, tuple)) else size


def check_parts(transformer: Any, scheduler: Any, vae: Any, id2label: Any) -> None:
    """Refuse parts of another kind; diffusers loads what `model_index.json` names. `None` leaves a part out."""
    for name, part, fits, wanted in (
        ("transformer", transformer, "num_classes" in getattr(transformer, "config", ()), "an SDTTransformer2DModel"),
        ("scheduler", scheduler, isinstance(scheduler, SchedulerMixin), "a scheduler of diffusers"),
        ("vae", vae, hasattr(vae, "decode") and hasattr(vae, "config"), "a VAE of diffusers"),
    ):
        if part is not None and not fits:
            raise ValueError(f"{name} must be {wanted}, not a {type(part).__name__}.")
    if vae is not None:
        check_normalization(vae)
    # Offloaded parts are on the meta device, and a whole VAE may be on purpose.
    offloaded = vae is None or hasattr(vae, "hf_device_map")
    missing = [] if offloaded else [name for name, value in vae.named_parameters() if value.is_meta]
    if missing and len(missing) < len(list(vae.parameters())):
        raise ValueError(f"The vae is not whole: its files have no {shortened(missing)}.")
    items = id2label.items() if isinstance(id2label, dict) else [(id2label, "")] if id2label else []
    if not all(str(label).isdecimal() and isinstance(text, str) for label, text in items):
        raise ValueError("id2label must map label ids to class names.")


def _averages(transformer: Any) -> bool:
    """Return whether a model predicts the average of a flow over a step, and so has to know its end."""
    return bool(transformer.config.get("interval_conditioning", False))


def step_ends(transformer: Any, scheduler: SchedulerMixin) -> Sequence[torch.Tensor | None]:
    """Return the timestep at which each step of a run ends, for a model that has to know it; else `None` for each."""
    if not _averages(transformer):
        return [None] * len(scheduler.timesteps)
    return scheduler.sigmas[1:] * scheduler.config.num_train_timesteps


def check_network_output(transformer: Any, scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that does not take steps as the model predicts them: by a flow, or by its average."""
    if _averages(transformer) and type(scheduler) is not FlowMatchEulerDiscreteScheduler:
        raise ValueError(
            "A model with interval_conditioning predicts the average of the flow over a step, of which "
            f"{type(scheduler).__name__} makes none: use FlowMatchEulerDiscreteScheduler."
        )
    if transformer.config.get("network_output") == "clean" and not is_flow(scheduler):
        raise ValueError(
            f"network_output 'clean' makes the model return a flow, which {type(scheduler).__name__} does not sample "
            "from: use flow matching, or network_output 'prediction'."
        )
