"""A denoiser that is exactly right for Gaussian data, and pipelines of it."""

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin

from sdt_diffusion.sdt.schedulers import DIT_SCHEDULE

MEAN, STD = 0.4, 0.5


class GaussianDenoiser(diffusers.ModelMixin, ConfigMixin, CacheMixin):
    """What a perfectly trained model predicts when every pixel of the data is N(0.4, 0.5^2)."""

    @register_to_config
    def __init__(self, kind, in_channels=1, sample_size=32, patch_size=1, num_classes=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))  # gives the model a device and a dtype
        self.log_alphas_cumprod = np.log(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))

    def forward(self, hidden_states, timestep, class_labels, return_dict=False):
        t, x = timestep[0].double(), hidden_states.double()
        if self.config.kind == "flow":
            a, sigma = 1 - t / 1000, t / 1000
        else:
            log_alpha = np.interp(t.item(), np.arange(1000), self.log_alphas_cumprod)
            a, sigma = np.exp(log_alpha / 2), np.sqrt(1 - np.exp(log_alpha))
        variance = a**2 * STD**2 + sigma**2
        clean = MEAN + a * STD**2 / variance * (x - a * MEAN)
        noise = sigma / variance * (x - a * MEAN)
        prediction = {"flow": noise - clean, "epsilon": noise, "v_prediction": a * noise - sigma * clean}
        return (prediction[self.config.kind].float(),)


def draw(pipe, **call):
    generator = torch.Generator().manual_seed(0)
    return pipe([0] * 16, guidance_scale=1, generator=generator, output_type="latent", **call).images


def saved_scheduler(kind):
    """Return the scheduler that training saves."""
    if kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.DDIMScheduler(
        **DIT_SCHEDULE, prediction_type=kind, clip_sample=False, timestep_spacing="trailing"
    )


def flow_of(x, sigma):
    return GaussianDenoiser("flow")(x, torch.tensor([1000.0 * sigma]), None)[0]


class GaussianMeanFlow(diffusers.ModelMixin, ConfigMixin, CacheMixin):
    """The exact average, from `end_timestep` to `timestep`, of the flow of data whose pixels are N(0.4, 0.5^2).

    The flow moves quantiles to quantiles: z_t = (1 - t) m + s_t q, where s_t^2 = (1 - t)^2 s^2 + t^2.
    """

    @register_to_config
    def __init__(self, in_channels=1, sample_size=32, patch_size=1, num_classes=1, interval_conditioning=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))  # gives the model a device and a dtype

    def forward(
        self, hidden_states, timestep, class_labels, force_drop_ids=None, end_timestep=None, return_dict=False
    ):
        dtype = hidden_states.dtype
        end_timestep = timestep if end_timestep is None else end_timestep
        t, r = (x.double().reshape(-1, 1, 1, 1) / 1000 for x in (timestep, end_timestep))
        spread, end_spread = (((1 - x) ** 2 * STD**2 + x**2).sqrt() for x in (t, r))
        quantile = (hidden_states.double() - (1 - t) * MEAN) / spread
        slope = (t - (1 - t) * STD**2) / spread  # of the spread, by t
        # (s_t - s_r) / (t - r), without a division by 0 where t = r.
        slope = torch.where(t > r, (spread - end_spread) / torch.where(t > r, t - r, 1), slope)
        return ((quantile * slope - MEAN).to(dtype),)
