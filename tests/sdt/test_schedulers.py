"""Every scheduler, through the pipeline, with a denoiser that is exactly right for Gaussian data."""

import diffusers
import numpy as np
import pytest
import torch

from sdt_diffusion import swap_scheduler
from sdt_diffusion.sdt.schedulers import (
    DIFFUSION_SCHEDULERS,
    DIT_SCHEDULE,
    FLOW_SCHEDULERS,
    UNFIT_SCHEDULERS,
    is_flow,
    noise_scales,
)

from .gaussian import MEAN, STD, GaussianDenoiser, draw, saved_scheduler


def sample(make_pipe, kind, scheduler, steps=100):
    return draw(make_pipe(scheduler, transformer=GaussianDenoiser(kind)), num_inference_steps=steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", DIFFUSION_SCHEDULERS)
def test_diffusion_schedulers_sample_the_gaussian(make_pipe, name, prediction_type):
    saved = saved_scheduler(prediction_type)
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


@pytest.mark.parametrize(
    "name",
    ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler"],
)
def test_the_noise_of_steps_is_that_of_each_image(make_pipe, name):
    pipe = make_pipe(swap_scheduler(saved_scheduler("epsilon"), name), transformer=GaussianDenoiser("epsilon"))

    def images(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe([0] * len(seeds), 1, 4, generator=generators, output_type="latent").images

    torch.testing.assert_close(images(5, 6)[1:], images(6), rtol=0, atol=1e-5)
    assert not torch.allclose(images(5), images(6))


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


class LearnedGaussian(GaussianDenoiser):
    """Also predicts how exactly x_t-1 is known: where its log variance lies between posterior and beta."""

    def __init__(self, scheduler):
        super().__init__("epsilon")
        self.scheduler = scheduler
        self.register_to_config(out_channels=2)

    def forward(self, hidden_states, timestep, class_labels, return_dict=False):
        noise = super().forward(hidden_states, timestep, class_labels)[0]
        t = int(timestep[0])
        before_t = int(self.scheduler.previous_timestep(t))
        now = np.exp(self.log_alphas_cumprod[t])
        before = np.exp(self.log_alphas_cumprod[before_t]) if before_t >= 0 else 1.0
        beta = 1 - now / before
        posterior = max(beta * (1 - before) / (1 - now), 1e-20)
        # Var(x_t-1 | x_t) = posterior + (factor of x_0)^2 Var(x_0 | x_t)
        of_clean = 1 / (1 / STD**2 + now / (1 - now))
        variance = posterior + before * (beta / (1 - now)) ** 2 * of_clean
        share = np.log(variance / posterior) / np.log(beta / posterior)
        return (torch.cat([noise, torch.full_like(noise, 2 * share - 1)], dim=1),)


def test_ddpm_of_the_exact_variance_is_exact_in_few_steps(make_pipe):
    errors = {}
    for variance_type in ("learned_range", "fixed_small", "fixed_large"):
        scheduler = swap_scheduler(
            saved_scheduler("epsilon"), "DDPMScheduler", variance_type=variance_type, timestep_spacing="trailing"
        )
        transformer = LearnedGaussian(scheduler) if variance_type == "learned_range" else GaussianDenoiser("epsilon")
        samples = draw(make_pipe(scheduler, transformer=transformer), num_inference_steps=100)
        # The last step adds no noise: the images have the variance of E[x_0 | x_1].
        errors[variance_type] = abs(samples.std().item() / STD - 1)
    assert errors["learned_range"] < 0.01
    assert errors["fixed_small"] > 0.04
    assert errors["fixed_large"] > 0.02


def test_ddpm_is_the_sampler_of_dit(make_pipe):
    """DiT makes a diffusion of fewer steps with betas of its own, and draws x_t-1 from N(mean, variance)."""
    steps, alpha_bar = 20, np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    options = {"variance_type": "learned_range", "timestep_spacing": "linspace"}
    scheduler = swap_scheduler(saved_scheduler("epsilon"), "DDPMScheduler", **options)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[:4].tolist() == [999, 979, 958, 938]

    used = np.round(np.linspace(0, 999, steps)).astype(int)
    kept = alpha_bar[used]
    before = np.append(1.0, kept[:-1])
    betas = 1 - kept / before
    variance = betas * (1 - before) / (1 - kept)
    log_variance = np.log(np.append(variance[1], variance[1:]))
    model, generator = LearnedGaussian(scheduler), torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 32, 32, generator=generator)
    scheduler.set_timesteps(steps)
    for i in reversed(range(steps)):
        noise, share = model(x, torch.tensor([used[i]]), None)[0].chunk(2, dim=1)
        clean = (x - (1 - kept[i]) ** 0.5 * noise) / kept[i] ** 0.5
        mean = before[i] ** 0.5 * betas[i] / (1 - kept[i]) * clean
        mean = mean + (1 - betas[i]) ** 0.5 * (1 - before[i]) / (1 - kept[i]) * x
        log = (share + 1) / 2 * np.log(betas[i]) + (1 - share) / 2 * log_variance[i]
        x = mean + (i > 0) * torch.exp(log / 2) * (torch.randn(x.shape, generator=generator) if i else 0)
    torch.testing.assert_close(draw(make_pipe(scheduler, transformer=model), num_inference_steps=steps), x.float())


def test_an_objective_without_a_noise_schedule_is_refused():
    with pytest.raises(ValueError, match="objective must hold a prediction_type and num_train_timesteps"):
        swap_scheduler({}, "DDIMScheduler")


def test_options_of_schedulers():
    saved = saved_scheduler("epsilon")
    options = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
    swapped = swap_scheduler(saved, "DPMSolverMultistepScheduler", **options)
    assert {name: swapped.config[name] for name in options} == options
    assert swap_scheduler(saved, "DDIMScheduler", timestep_spacing="leading").config.timestep_spacing == "leading"
    for name, value, message in (
        ("spacing", "leading", "DDIMScheduler has no option 'spacing': it has "),
        ("beta_end", 0.01, "beta_end follows from the model and cannot be chosen"),
        ("prediction_type", "epsilon", "prediction_type follows from the model"),
        ("use_flow_sigmas", True, "use_flow_sigmas follows from the model"),
        ("clip_sample", "yes", "clip_sample must be like"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_scheduler(saved, "DDIMScheduler", **{name: value})


def test_pixels_are_clipped_after_swapping_back_too():
    there = swap_scheduler(diffusers.DDIMScheduler(**DIT_SCHEDULE, clip_sample=True), "UniPCMultistepScheduler")
    assert swap_scheduler(there, "DDPMScheduler").config.clip_sample


def test_swapping_does_not_start_to_clip_latents():
    saved = diffusers.DPMSolverMultistepScheduler(**DIT_SCHEDULE)
    for name in ("DDPMScheduler", "DDIMScheduler"):
        assert not swap_scheduler(saved, name).config.clip_sample


def test_a_scheduler_that_does_not_fit_is_refused_with_the_reason():
    for name, reason in UNFIT_SCHEDULERS.items():
        with pytest.raises(ValueError, match=f"{name}' is not a scheduler for this .* model: it {reason}"):
            swap_scheduler(saved_scheduler("flow" if name.startswith("Flow") else "epsilon"), name)
