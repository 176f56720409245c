"""Every scheduler, through the pipeline, with a denoiser that is exactly right for Gaussian data."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin

from sdt_diffusion.sdt.schedulers import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS, is_flow, noise_scales, swap_scheduler

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


def sample(make_pipe, kind, scheduler):
    pipe = make_pipe(scheduler, transformer=GaussianDenoiser(kind))
    generator = torch.Generator().manual_seed(0)
    return pipe([0] * 16, guidance_scale=1, num_inference_steps=100, generator=generator, output_type="latent").images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", DIFFUSION_SCHEDULERS)
def test_diffusion_schedulers_sample_the_gaussian(make_pipe, name, prediction_type):
    saved = diffusers.DDIMScheduler(
        1000, 1e-4, 2e-2, "linear", prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing"
    )
    samples = sample(make_pipe, prediction_type, swap_scheduler(saved, name))
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert samples.std().item() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_flow_schedulers_sample_the_gaussian(make_pipe, name, shift):
    saved = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    samples = sample(make_pipe, "flow", swap_scheduler(saved, name))
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert samples.std().item() == pytest.approx(STD, abs=0.03)


def test_swapping_keeps_the_noise_schedule():
    saved = diffusers.DDIMScheduler()  # whose default betas are not those of every other scheduler
    for name in DIFFUSION_SCHEDULERS:
        torch.testing.assert_close(swap_scheduler(saved, name).alphas_cumprod, saved.alphas_cumprod)


def test_swapping_back_and_forth_keeps_the_kind():
    saved = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    there = swap_scheduler(saved, "UniPCMultistepScheduler")
    assert is_flow(there)
    back = swap_scheduler(there, "FlowMatchEulerDiscreteScheduler")
    assert back.config.shift == 3.0


def test_swapping_keeps_what_the_other_scheduler_knows_too():
    saved = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, use_karras_sigmas=True)
    assert swap_scheduler(saved, "FlowMatchEulerDiscreteScheduler").config.use_karras_sigmas
    assert swap_scheduler(saved, "UniPCMultistepScheduler").config.use_karras_sigmas


def test_learned_variance_is_dropped_where_it_would_cut_channels():
    saved = diffusers.DDPMScheduler(variance_type="learned_range")
    assert swap_scheduler(saved, "DDPMScheduler").config.variance_type == "learned_range"
    assert not str(swap_scheduler(saved, "DPMSolverMultistepScheduler").config.variance_type).startswith("learned")


def test_schedulers_of_the_other_kind_are_refused():
    with pytest.raises(
        ValueError, match=r"'DDIMScheduler' is not a scheduler for this flow-matching model.*FlowMatch"
    ):
        swap_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), "DDIMScheduler")
    with pytest.raises(ValueError, match=r"for this epsilon model: choose one of DDPMScheduler"):
        swap_scheduler(diffusers.DDIMScheduler(), "FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ValueError, match="'PLMS' is not a scheduler"):
        swap_scheduler(diffusers.DDIMScheduler(), "PLMS")


def test_noise_is_that_of_training():
    for name in FLOW_SCHEDULERS:
        # A shift moves the steps of sampling, not what a timestep means.
        flow = swap_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0), name)
        assert noise_scales(flow, 250.0) == (0.75, 0.25)
        assert noise_scales(flow, 1000) == (0, 1)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[300]
    for name in DIFFUSION_SCHEDULERS:
        diffusion = swap_scheduler(diffusers.DDPMScheduler(1000, 1e-4, 2e-2, "linear"), name)
        assert noise_scales(diffusion, 300.0) == pytest.approx((alpha_bar**0.5, (1 - alpha_bar) ** 0.5), rel=1e-5)


def test_timesteps_that_a_model_does_not_know_are_refused():
    for timestep in (0.5, 1000, -1):
        with pytest.raises(ValueError, match=f"--t must be a whole number from 0 to 999 .*, not {timestep}"):
            noise_scales(diffusers.DDIMScheduler(), timestep, "--t")
    for timestep in (1000.5, -1, float("nan")):
        with pytest.raises(ValueError, match=f"--t must be between 0 and 1000, .*, not {timestep}"):
            noise_scales(diffusers.FlowMatchEulerDiscreteScheduler(), timestep, "--t")
