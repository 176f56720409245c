"""The stochastic sampler of flow-matching models: SiT's reverse SDE (arXiv 2401.08740), beside its ODE."""

from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..utils.ranges import Range, check_value

#: How strong the noise is at a noise level; SiT's names, without SBDM, which is infinite at pure noise.
Diffusion = Literal["none", "sigma", "constant", "decreasing", "increasing-decreasing"]
LastStep = Literal["euler", "mean"]
#: Values that the numbers may have.
DIFFUSION_SCALES, STEP_SIZES = Range(0, 100), Range(0, 1, with_least=False)


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler-Maruyama steps along an SDE that has the same distribution at every noise level as the flow's ODE.

    With x = (1 - sigma) clean + sigma noise and the flow u = noise - clean, a step from sigma to sigma - h is

        x - h u + h w score + sqrt(2 h w) z,    score = -E[noise | x] / sigma = -(x + (1 - sigma) u) / sigma

    for any w(sigma) >= 0. The noise levels are 1 - i/N, so that N steps are worth N; with `diffusion` "none", this is
    SiT's Euler solver of the ODE.

    Args:
        num_train_timesteps: Timestep of pure noise.
        shift: Moves the noise levels towards noise, as in diffusers: shift s / (1 + (shift - 1) s).
        diffusion: w(sigma): "none" 0, "sigma" c sigma, "constant" c, "decreasing" from noise to image
            ((c cos(pi (1 - sigma)) + 1) / 2)^2, "increasing-decreasing" c sin(pi sigma)^2; c is `diffusion_scale`.
        diffusion_scale: The factor c.
        last_step_size: Noise level from which the last step goes to the image; 1/N if `None`, 0.04 in SiT.
        last_step: The last step, which adds no noise: "euler", along the flow alone, or "mean", SiT's, with the score.

    Raises:
        ValueError: If a value is out of range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        diffusion: Diffusion = "sigma",
        diffusion_scale: float = 1.0,
        last_step_size: float | None = None,
        last_step: LastStep = "euler",
    ):
        check_value("diffusion", diffusion, (Diffusion,))
        check_value("diffusion_scale", diffusion_scale, (float,), DIFFUSION_SCALES)
        check_value("last_step", last_step, (LastStep,))
        if last_step_size is not None:
            check_value("last_step_size", last_step_size, (float,), STEP_SIZES)
        super().__init__(num_train_timesteps, shift)

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """Set the noise levels of a run; those given are shifted, as in diffusers.

        Args:
            num_inference_steps: Number of steps N.
            device: Where the timesteps are to be.
            sigmas: Noise levels, from 1 downwards, without the 0 at the end.
            mu: Not used here; diffusers' name.
            timesteps: `num_train_timesteps` times the noise levels.
        """
        if sigmas is None and timesteps is None:
            last = 1 / num_inference_steps if self.config.last_step_size is None else self.config.last_step_size
            sigmas = np.linspace(1, last, num_inference_steps)
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)

    def diffusion_at(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return w at noise levels of any shape."""
        scale = self.config.diffusion_scale
        if self.config.diffusion == "sigma":
            return scale * sigma
        if self.config.diffusion == "constant":
            return scale * torch.ones_like(sigma)
        if self.config.diffusion == "decreasing":
            return ((scale * torch.cos(torch.pi * (1 - sigma)) + 1) / 2) ** 2
        if self.config.diffusion == "increasing-decreasing":
            return scale * torch.sin(torch.pi * sigma) ** 2
        return torch.zeros_like(sigma)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Step to the next noise level.

        Args:
            model_output: The flow, shape (batch, channels, height, width).
            timestep: One of `timesteps`.
            sample: The image at this noise level, of the same shape.
            generator: Of the noise; one, or one for each image.
            return_dict: Whether to return an object instead of a tuple.

        Returns:
            The image at the next noise level, `prev_sample`.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, next_sigma = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        # The ODE's step also counts this step.
        result = super().step(model_output, timestep, sample, return_dict=False)[0]
        last = next_sigma == 0
        if self.config.diffusion != "none" and not (last and self.config.last_step == "euler"):
            drift = self.diffusion_at(sigma) * (sigma - next_sigma)  # h w
            x, flow = sample.float(), model_output.float()
            moved = result.float() - drift * (x + (1 - sigma) * flow) / sigma
            if not last:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
                moved = moved + (2 * drift).sqrt() * noise
            result = moved.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result) if return_dict else (result,)
