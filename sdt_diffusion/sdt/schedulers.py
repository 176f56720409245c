"""Choose schedulers for trained models, and compute the noise levels of training."""

import inspect

import diffusers
from diffusers.schedulers import SchedulerMixin

#: The noise schedule of facebookresearch/DiT.
DIT_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
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
