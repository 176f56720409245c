"""Choose schedulers for trained models, and compute the noise levels of training."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers import DDPMScheduler, SchedulerMixin

from ..utils.ranges import Range, check_value
from .flow_sde import FlowMatchSDEScheduler

#: The noise schedule of facebookresearch/DiT.
DIT_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
#: Values that the numbers of saved schedulers and of sampling may have.
STEPS, BETAS = Range(1, 100_000), Range(0, 1, with_most=False)
SHIFTS, GUIDANCE = Range(0, 1000, with_least=False), Range(0, 1000)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
#: Parts of a scheduler's config that say what a model has learned, and not how it is sampled.
OBJECTIVE_KEYS = (
    *("prediction_type", "num_train_timesteps"),
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
)
#: Schedulers that are tested against an exact denoiser.
DIFFUSION_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchSDEScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
#: Schedulers that sample something else from models like ours -> why.
UNFIT_SCHEDULERS = {
    **dict.fromkeys(
        ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"),
        "is for distilled consistency models, and samples others with too little variance",
    ),
    "SCMScheduler": "is for consistency models on a trigonometric schedule",
    "CMStochasticIterativeScheduler": "is for consistency models on EDM's noise levels",
    **dict.fromkeys(
        ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "KarrasVeScheduler"),
        "is for models of EDM's noise levels and scaling",
    ),
    **dict.fromkeys(
        ("IPNDMScheduler", "CosineDPMSolverMultistepScheduler"), "has a noise schedule of its own, not the model's"
    ),
    **dict.fromkeys(
        ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"), "goes from images to noise, not to images"
    ),
}
#: Options with which schedulers sample something else from models like ours -> why.
UNFIT_OPTIONS = {
    "stochastic_sampling": "is for distilled models, and samples others with too little variance; noise at every step "
    "that keeps the distribution is FlowMatchSDEScheduler's",
    "invert_sigmas": "goes from images to noise, not to images",
    "use_dynamic_shifting": "wants a shift for each size of images, which is not computed here: give one shift",
}


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Return whether a scheduler samples from flow-matching models."""
    flow_match = any(base.__name__.startswith("FlowMatch") for base in type(scheduler).__mro__)
    return flow_match or scheduler.config.get("prediction_type") == "flow_prediction"


def check_scheduler_config(config: dict[str, Any]) -> None:
    """Refuse a saved config that makes noise levels of nonsense, or more of them than memory holds.

    Raises:
        ValueError: Names the value.
    """
    parameters = _parameters(config)
    for name, value in config.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item) and not _is_default(item, parameters.get(name)):
                raise ValueError(f"The scheduler's {name} must be finite, not {item}.")
    for name, parameter in parameters.items():
        _check_kind(name, config.get(name), parameter)
    check_value("The scheduler's num_train_timesteps", config.get("num_train_timesteps"), (int,), STEPS)
    for name in ("beta_start", "beta_end"):
        check_value(f"The scheduler's {name}", config.get(name, 0.01), (float,), BETAS)
    check_value("The scheduler's shift", config.get("shift", 1.0), (float,), SHIFTS)
    if config.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise ValueError(
            f"The scheduler's prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not "
            f"{config['prediction_type']!r}."
        )


def _parameters(config: dict[str, Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the scheduler that a config is of."""
    return inspect.signature(_class_of(str(config.get("_class_name"))).__init__).parameters


def _class_of(name: str) -> Any:
    """Return the scheduler of a name; `object` if there is none."""
    return FlowMatchSDEScheduler if name == FlowMatchSDEScheduler.__name__ else getattr(diffusers, name, object)


def _is_default(value: Any, parameter: inspect.Parameter | None) -> bool:
    """Return whether a value is the parameter's default, as DPM-Solver's lambda_min_clipped of -inf is."""
    return parameter is not None and value == parameter.default


def _check_kind(name: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuse a value of another kind than the parameter's default or annotation, such as a text for a bool."""
    default, annotation = parameter.default, str(parameter.annotation)
    kind = next((kind for kind in (bool, (int, float), str) if isinstance(default, kind)), object)  # a bool is an int
    wrong = not isinstance(value, kind)
    if default is None:
        lists = any(word in annotation for word in ("list", "List", "ndarray"))
        wrong = isinstance(value, dict) or (isinstance(value, list) and not lists)
        wrong |= isinstance(value, str) and "str" not in annotation
    if value is not None and wrong:
        raise ValueError(f"The scheduler's {name} must be like {default!r}, its default, not {value!r:.60}.")


def learns_variance(scheduler: SchedulerMixin) -> bool:
    """Return whether a scheduler's config expects the model to predict the variance too."""
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


def check_sampling_setting(name: str, value: Any, scheduler: SchedulerMixin | None = None) -> None:
    """Refuse a `guidance_scale` or `num_inference_steps` that is none, or too many steps for a scheduler.

    Raises:
        ValueError: Names the setting, its value, and what is allowed.
    """
    if name == "guidance_scale":
        check_value(name, value, (float,), GUIDANCE)
        return
    trained = STEPS.most if scheduler is None or is_flow(scheduler) else scheduler.config.num_train_timesteps
    check_value(name, value, (int,), STEPS._replace(most=trained))


def swap_scheduler(scheduler: SchedulerMixin | Mapping[str, Any], name: str, **options: Any) -> SchedulerMixin:
    """Return another scheduler for the same model, with the noise schedule and prediction type of the given one.

    For a pipeline's scheduler, see `SDTPipeline.swap_scheduler`.

    Args:
        scheduler: The scheduler saved with the model, or the pipeline's `objective`.
        name: Class name in diffusers, such as "DPMSolverMultistepScheduler", or "FlowMatchSDEScheduler".
        **options: Arguments of that class, except those that follow from the model.

    Returns:
        The new scheduler, or the given one if it is of that class and there are no options.

    Raises:
        ValueError: If the name or an option is unknown, or the scheduler cannot sample from such a model.
    """
    if isinstance(scheduler, Mapping):
        check_objective(scheduler)
        scheduler = _scheduler_of(scheduler)
    flow = is_flow(scheduler)
    known = FLOW_SCHEDULERS if flow else DIFFUSION_SCHEDULERS
    if name not in known:
        kind = "flow-matching" if flow else f"{scheduler.config.prediction_type}"
        why = f": it {UNFIT_SCHEDULERS[name]}. Choose" if name in UNFIT_SCHEDULERS else ": choose"
        raise ValueError(f"{name!r} is not a scheduler for this {kind} model{why} one of {', '.join(known)}.")
    if name == type(scheduler).__name__ and not options:
        return scheduler
    scheduler_class = _class_of(name)
    accepted = inspect.signature(scheduler_class.__init__).parameters
    # With `_use_default_values`, from_config would replace values that are the old class's defaults: other betas.
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if flow:
        config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "shift": shift}
    config.setdefault("clip_sample", False)  # clipping is DDPM's default, which would cut latents
    if name != "DDPMScheduler" and str(config.get("variance_type")).startswith("learned"):
        config.pop("variance_type")  # other schedulers would cut the prediction to three channels
    _check_options(scheduler_class, options)
    config |= options
    if name.startswith("FlowMatch"):
        return scheduler_class(**{key: config[key] for key in accepted if key in config})
    return scheduler_class.from_config(config)


def _scheduler_of(objective: Mapping[str, Any]) -> SchedulerMixin:
    """Return this package's default scheduler of an objective."""
    if objective["prediction_type"] == "flow_prediction":
        return diffusers.FlowMatchEulerDiscreteScheduler(objective["num_train_timesteps"])
    return diffusers.DDIMScheduler(**objective, clip_sample=False, timestep_spacing="trailing")


def _check_options(scheduler_class: Any, options: dict[str, Any]) -> None:
    """Refuse options that a scheduler does not have, or that the model decides."""
    of_model = {*OBJECTIVE_KEYS, "use_flow_sigmas"}
    accepted = set(inspect.signature(scheduler_class.__init__).parameters) - {"self", *of_model}
    for name in options:
        if name in of_model:
            raise ValueError(f"The scheduler's {name} follows from the model and cannot be chosen.")
        if name not in accepted:
            raise ValueError(
                f"{scheduler_class.__name__} has no option {name!r}: it has {', '.join(sorted(accepted))}."
            )
    check_scheduler_config({"_class_name": scheduler_class.__name__, "num_train_timesteps": 1000, **options})


def objective_of(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return what models have learned that a scheduler samples from: the `OBJECTIVE_KEYS` of its config."""
    steps = scheduler.config.get("num_train_timesteps")
    if is_flow(scheduler):
        return {"prediction_type": "flow_prediction", "num_train_timesteps": steps}
    # A config also keeps values that its class does not know.
    accepted = inspect.signature(type(scheduler).__init__).parameters
    found = {key: scheduler.config[key] for key in OBJECTIVE_KEYS if key in accepted and key in scheduler.config}
    if found.get("trained_betas") is not None:
        found["trained_betas"] = np.asarray(found["trained_betas"], dtype=float).tolist()
    return {"prediction_type": "epsilon", "num_train_timesteps": steps, **found}


def check_objective(objective: Any) -> None:
    """Refuse a saved objective that is none.

    Raises:
        ValueError: Names the value.
    """
    if not isinstance(objective, Mapping) or not {"prediction_type", "num_train_timesteps"} <= set(objective):
        raise ValueError(f"objective must hold a prediction_type and num_train_timesteps, not {objective!r:.60}.")
    unknown = sorted(set(objective) - set(OBJECTIVE_KEYS))
    if unknown:
        raise ValueError(f"objective holds {', '.join(map(str, unknown))}, which is none of its keys.")
    check_scheduler_config({"_class_name": "DDPMScheduler", **objective})
    if objective["prediction_type"] == "flow_prediction":
        return
    try:
        DDPMScheduler(**objective)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"objective makes no noise schedule: {error}") from error


def check_fits(scheduler: SchedulerMixin, objective: Mapping[str, Any]) -> None:
    """Refuse a scheduler that samples something else than what the model has learned.

    Args:
        scheduler: The scheduler.
        objective: `objective_of` the scheduler that was saved with the model.

    Raises:
        ValueError: Says what does not fit, and how to make one that does.
    """
    name, flow = type(scheduler).__name__, objective["prediction_type"] == "flow_prediction"
    known = FLOW_SCHEDULERS if flow else DIFFUSION_SCHEDULERS
    kind = "flow-matching" if flow else objective["prediction_type"]
    tested = any(base.__name__ in known for base in type(scheduler).__mro__)
    found = objective_of(scheduler)["prediction_type"]
    unfit = [f"with {option} {why}" for option, why in UNFIT_OPTIONS.items() if scheduler.config.get(option)]
    if learns_variance(scheduler) and not isinstance(scheduler, DDPMScheduler):
        wrong = f"with variance_type {scheduler.config.variance_type!r} cuts predictions to three channels"
    elif not tested and type(scheduler).__module__.startswith("diffusers."):
        wrong = UNFIT_SCHEDULERS.get(name, f"does not sample from {kind} models, or is not tested with them")
    elif unfit:
        wrong = unfit[0]
    elif found != objective["prediction_type"]:
        wrong = f"is set to sample from {found} models, but the model is of {objective['prediction_type']}"
    elif _uses_flow_sigmas(scheduler) != flow:
        wrong = f"uses other noise levels than {kind} models have (use_flow_sigmas is {'false' if flow else 'true'})"
    elif not _has_noise_levels_of(scheduler, objective):
        wrong = "has other noise levels (betas or num_train_timesteps) than the model was trained with"
    else:
        return
    call = f"pipe.swap_scheduler({name!r})"
    if name not in known:
        call = f"{call.replace(repr(name), 'NAME')}, where NAME is one of {', '.join(known)}"
    raise ValueError(f"{name} {wrong}. Make one that fits: {call}.")


def _uses_flow_sigmas(scheduler: SchedulerMixin) -> bool:
    """Return whether a scheduler samples at the noise levels of flows, as those that know nothing else do."""
    if "use_flow_sigmas" in inspect.signature(type(scheduler).__init__).parameters:
        return bool(scheduler.config.use_flow_sigmas)
    return is_flow(scheduler)


def _has_noise_levels_of(scheduler: SchedulerMixin, objective: Mapping[str, Any]) -> bool:
    if scheduler.config.get("num_train_timesteps") != objective["num_train_timesteps"]:
        return False
    if objective["prediction_type"] == "flow_prediction":
        return True
    expected = DDPMScheduler(**objective).alphas_cumprod
    found = getattr(scheduler, "alphas_cumprod", torch.empty(0))
    # Some schedulers keep the last of a schedule that ends at pure noise a little above 0.
    return found.shape == expected.shape and torch.allclose(found.cpu(), expected, rtol=1e-5, atol=1e-6)


def noise_scales(scheduler: SchedulerMixin, timestep: float, name: str = "timestep") -> tuple[float, float]:
    """Return the factors by which training multiplies image and noise at a timestep before it adds them.

    Args:
        scheduler: The scheduler saved with the model, or one of the same noise levels.
        timestep: 1000 sigma of a flow, (1 - sigma) x + sigma noise; or a step of a DDPM schedule,
            sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise.
        name: What to call the timestep in a message.

    Returns:
        The factors of the image and of the noise.

    Raises:
        ValueError: If the model has no such timestep.
    """
    steps, flow = scheduler.config.num_train_timesteps, is_flow(scheduler)
    if not (0 <= timestep <= steps if flow else timestep in range(steps)):
        known = f"between 0 and {steps}, which is {steps} sigma," if flow else f"a whole number from 0 to {steps - 1}"
        raise ValueError(f"{name} must be {known} for this model, not {timestep:g}.")
    if flow:
        return 1 - timestep / steps, timestep / steps
    alpha_bar = float(scheduler.alphas_cumprod[int(timestep)].double())
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
