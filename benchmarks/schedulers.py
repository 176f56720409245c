"""Measure how far each scheduler ends from the data, with a denoiser that is exactly right.

    python benchmarks/schedulers.py                  # the table of docs/sampling.md
    python benchmarks/schedulers.py --steps 5 250

Every pixel of the data is N(0.4, 0.5^2). The error is the distance of the samples' mean and standard deviation from
these, over the data's standard deviation; 640,000 pixels know it to 0.002. In brackets, how often the model was asked.
"""

import argparse
import inspect

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from sdt_diffusion import swap_scheduler
from sdt_diffusion.sdt.schedulers import DIFFUSION_SCHEDULERS, DIT_SCHEDULE, FLOW_SCHEDULERS, is_flow
from sdt_diffusion.sdt.steps import set_schedule

MEAN, STD = 0.4, 0.5
#: Schedulers of flows whose steps `uniform_sigmas` changes.
MENDED = (
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    *("DEISMultistepScheduler", "SASolverScheduler"),
)
LOG_ALPHA_BAR = np.log(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))


def predict(x: torch.Tensor, timestep: float, flow: bool) -> torch.Tensor:
    """Return the flow, or the noise, that a perfectly trained model predicts."""
    log_alpha_bar = np.interp(timestep, np.arange(1000), LOG_ALPHA_BAR)
    a, s = (1 - timestep / 1000, timestep / 1000)
    if not flow:
        a, s = np.exp(log_alpha_bar / 2), np.sqrt(1 - np.exp(log_alpha_bar))
    variance = a**2 * STD**2 + s**2
    noise = s / variance * (x - a * MEAN)
    return noise - (MEAN + a * STD**2 / variance * (x - a * MEAN)) if flow else noise


def error_of(scheduler: SchedulerMixin, steps: int, uniform: bool) -> tuple[float, int]:
    """Return the error, and how often the model was asked."""
    generator = torch.Generator().manual_seed(0)
    set_schedule(scheduler, steps, uniform=uniform)
    x = torch.randn(1, 1, 800, 800, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    noise = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        flow = predict(seen.double(), float(t), is_flow(scheduler)).float()
        x = scheduler.step(flow, t, x, return_dict=False, **noise)[0]
    error = np.hypot(x.double().mean().item() - MEAN, x.double().std().item() - STD) / STD
    return float(error), len(scheduler.timesteps)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 25, 50])
    args = parser.parse_args()
    diffusion = DDIMScheduler(**DIT_SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    flow = FlowMatchEulerDiscreteScheduler()
    rows = [(name, diffusion, name, {}, False) for name in DIFFUSION_SCHEDULERS]
    large = {"variance_type": "fixed_large", "timestep_spacing": "linspace"}
    rows.append(("DDPMScheduler, DiT's `fixed_large` and `linspace`", diffusion, "DDPMScheduler", large, False))
    rows += [(name, flow, name, {}, True) for name in FLOW_SCHEDULERS]
    rows += [(f"{name}, diffusers' steps", flow, name, {}, False) for name in MENDED]
    for kind in ("constant", "decreasing", "increasing-decreasing"):
        rows.append((f"FlowMatchSDEScheduler, `{kind}`", flow, "FlowMatchSDEScheduler", {"diffusion": kind}, False))
    print(f"| scheduler | of | {' | '.join(map(str, args.steps))} |\n|---|---|{'---|' * len(args.steps)}")
    for label, saved, name, options, uniform in rows:
        found = [error_of(swap_scheduler(saved, name, **options), steps, uniform) for steps in args.steps]
        cells = [
            f"{error:.3f}" + (f" ({asked})" if asked != n else "")
            for (error, asked), n in zip(found, args.steps, strict=False)
        ]
        print(f"| {label} | {'flow' if saved is flow else 'epsilon'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
