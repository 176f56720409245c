"""Choose schedulers for trained models, and compute the noise levels of training."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.schedulers import SchedulerMixin

from ..utils.ranges import Range, check_value

#: The noise schedule of facebookresearch/DiT.
DIT_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
#: Values that the numbers of saved schedulers and of sampling may have.
STEPS, BETAS = Range(1, 100_000), Range(0, 1, with_most=False)
SHIFTS, GUIDANCE = Range(0, 1000, with_least=False), Range(0, 1000)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
#: Schedulers that are tested against an exact denoiser.
DIFFUSION_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
)
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Return whether a scheduler samples from flow-matching models."""
    return type(scheduler).__name__.startswith("FlowMatch") or (
        scheduler.config.get("prediction_type") == "flow_prediction"
    )


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
    return inspect.signature(getattr(diffusers, str(config.get("_class_name")), object).__init__).parameters


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


def swap_scheduler(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """Return another scheduler for the same model, with the noise schedule and prediction type of the given one.

    This is the safe way to change a pipeline's scheduler: for some pairs, `OtherScheduler.from_config(
    pipe.scheduler.config)` of diffusers loses the prediction type or the noise schedule without a warning.

        pipe.scheduler = sdt_diffusion.swap_scheduler(pipe.scheduler, "DPMSolverMultistepScheduler")

    Args:
        scheduler: The scheduler saved with the model.
        name: Class name in diffusers, such as "DPMSolverMultistepScheduler".

    Returns:
        The new scheduler, or the given one if it is of that class.

    Raises:
        ValueError: If the name is unknown, or the scheduler cannot sample from such a model.
    """
    flow = is_flow(scheduler)
    known = FLOW_SCHEDULERS if flow else DIFFUSION_SCHEDULERS
    if name not in known:
        kind = "flow-matching" if flow else f"{scheduler.config.prediction_type}"
        raise ValueError(f"{name!r} is not a scheduler for this {kind} model: choose one of {', '.join(known)}.")
    if name == type(scheduler).__name__:
        return scheduler
    scheduler_class = getattr(diffusers, name)
    shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
    config = dict(scheduler.config)
    # Without this, from_config replaces values that equal the old class's defaults by the new one's: other betas.
    config.pop("_use_default_values", None)
    if name.startswith("FlowMatch"):
        accepted = inspect.signature(scheduler_class.__init__).parameters
        return scheduler_class(**{key: config[key] for key in accepted if key in config} | {"shift": shift})
    if flow:
        config.update(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if name != "DDPMScheduler" and str(config.get("variance_type")).startswith("learned"):
        config.pop("variance_type")  # other schedulers would cut the prediction to three channels
    return scheduler_class.from_config(config)


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
