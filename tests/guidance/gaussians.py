"""Denoisers that are exactly right for Gaussian classes, and what guidance makes of them in closed form.

With x = clean + sigma noise, the best denoiser of N(m, s^2) is D = m + s^2 / (s^2 + sigma^2) (x - m), and sampling
solves dx/dsigma = (x - D) / sigma. Guidance D_weak + w (D - D_weak) of two Gaussians is linear in x, so that

    x(0) - x*(0) = (x(S) - x*(S)) F(0) / F(S),    F(sigma) = (s_weak^2 + sigma^2)^((1-w)/2) (s^2 + sigma^2)^(w/2)

for any solution x*. From pure noise on, samples have the standard deviation s^w s_weak^(1-w); and if both standard
deviations are s, the mean m_weak + w (m - m_weak).
"""

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin

from sdt_diffusion.sdt.guidance import sigma_at
from sdt_diffusion.sdt.schedulers import is_flow

SCHEDULERS = {
    "flow": diffusers.FlowMatchHeunDiscreteScheduler(),
    "epsilon": diffusers.DPMSolverMultistepScheduler(1000, 1e-4, 2e-2, "linear", timestep_spacing="trailing"),
    "v_prediction": diffusers.DPMSolverMultistepScheduler(
        1000, 1e-4, 2e-2, "linear", prediction_type="v_prediction", timestep_spacing="trailing"
    ),
}


class GaussianClasses(diffusers.ModelMixin, ConfigMixin, CacheMixin):
    """The exact prediction for classes N(mean, std^2), of which the last is the null class.

    A `decay_scale` multiplies the standard deviation, to tell the branches apart as a decay would.
    """

    @register_to_config
    def __init__(
        self, kind, means, stds, in_channels=1, sample_size=1, patch_size=1, spatial_decay="context", heads=1
    ):
        super().__init__()
        self.register_to_config(num_classes=len(means) - 1, num_attention_heads=heads, decay_heads_range=6.0)
        self.weight = torch.nn.Parameter(torch.zeros(()))  # gives the model a device and a dtype
        self.batch_sizes = []

    def forward(self, hidden_states, timestep, class_labels, return_dict=False, decay_scale=None):
        self.batch_sizes.append(len(hidden_states))
        scheduler = SCHEDULERS[self.config.kind]
        mean, std = (
            torch.tensor(values, dtype=torch.float64)[class_labels].view(-1, 1, 1, 1)
            for values in (self.config.means, self.config.stds)
        )
        if decay_scale is not None:
            std = std * decay_scale[:, :1, None, None].double()
        x, sigma = hidden_states.double(), sigma_at(scheduler, float(timestep[0]))
        a, s = (1 - sigma, sigma) if is_flow(scheduler) else ((1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5)
        variance = a**2 * std**2 + s**2
        clean = mean + a * std**2 / variance * (x - a * mean)
        noise = s / variance * (x - a * mean)
        prediction = {"flow": noise - clean, "epsilon": noise, "v_prediction": a * noise - s * clean}
        return (prediction[self.config.kind].float(),)


def ratio(w, std, weak_std, sigma):
    """Return F(sigma) over that without guidance."""
    return ((weak_std**2 + sigma**2) / (std**2 + sigma**2)) ** ((1 - w) / 2)


def spread_and_mean(pipe, steps=250, **kwargs):
    """Return standard deviation and mean of the samples of class 0, from what becomes of noise -1 and 1."""
    noise = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    low, high = pipe([0, 0], latents=noise, num_inference_steps=steps, output_type="latent", **kwargs).images.flatten()
    return ((high - low) / 2).item(), ((high + low) / 2).item()
