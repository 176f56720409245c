"""Sampling from models that predict the average of a flow over each step."""

import diffusers
import pytest
import torch

from sdt_diffusion import SDTGuidance, SDTPipeline
from sdt_diffusion.sampling.generate import count_evaluations
from tests.sdt.gaussian import MEAN, STD, GaussianDenoiser, GaussianMeanFlow, draw

NOISE = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def exact(**options):
    return SDTPipeline(GaussianMeanFlow(), diffusers.FlowMatchEulerDiscreteScheduler(**options), uniform_sigmas=True)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_steps_maps_noise_to_data_exactly(steps):
    for options in ({}, {"shift": 3.0}):
        torch.testing.assert_close(draw(exact(**options), num_inference_steps=steps), MEAN + STD * NOISE)
    torch.testing.assert_close(draw(exact(), sigmas=[1.0, 0.3]), MEAN + STD * NOISE)
    flow = SDTPipeline(GaussianDenoiser("flow"), diffusers.FlowMatchEulerDiscreteScheduler(), uniform_sigmas=True)
    assert (draw(flow, num_inference_steps=steps) - MEAN - STD * NOISE).std() > 0.02  # what the average saves


@pytest.fixture
def averaging(make_model):
    model = make_model(interval_conditioning=True, timestep_scale=0.001)
    return SDTPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler(), uniform_sigmas=True)


def test_both_predictions_of_guidance_know_where_the_step_ends(averaging):
    latents, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    found = averaging(
        [1, 2], guidance_scale=3.0, num_inference_steps=1, latents=latents, output_type="latent", return_dict=False
    )[0]
    with torch.no_grad():
        cond, null = (
            averaging.transformer(latents, torch.tensor(1000.0), y, end_timestep=torch.tensor(0.0)).sample
            for y in (labels, torch.full_like(labels, 5))
        )
    torch.testing.assert_close(found, latents - (null + 3 * (cond - null)), rtol=1e-4, atol=1e-4)
    settings = {"guidance_scale": 3.0, "num_inference_steps": 2}
    assert count_evaluations(averaging, settings) == 4
    assert count_evaluations(averaging, {**settings, "guidance_scale": 1.0}) == 2


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_of_other_steps_are_refused(averaging, scheduler):
    averaging.scheduler = scheduler
    with pytest.raises(ValueError, match=rf"average of the flow over a step, of which {type(scheduler).__name__}"):
        averaging([0], num_inference_steps=2)


def test_a_flow_cannot_guide_its_average(averaging, make_model):
    with pytest.raises(ValueError, match="has interval_conditioning False, but the transformer True"):
        SDTPipeline(
            averaging.transformer,
            averaging.scheduler,
            guider=SDTGuidance.from_kind("autoguidance"),
            guide_transformer=make_model(),
        )
