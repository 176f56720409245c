"""The flow SDE, by its exact distributions and beside SiT's formulas."""

import diffusers
import numpy as np
import pytest
import torch

from sdt_diffusion import FlowMatchSDEScheduler

from .gaussian import MEAN, STD, GaussianDenoiser, draw, flow_of


class TestFlowSDE:
    @pytest.mark.parametrize("diffusion", ["sigma", "constant", "decreasing", "increasing-decreasing"])
    def test_every_noise_level_has_the_distribution_of_the_flow(self, make_pipe, diffusion):
        pipe = make_pipe(FlowMatchSDEScheduler(diffusion=diffusion), transformer=GaussianDenoiser("flow"))
        seen = {}

        def watch(pipe, step, timestep, tensors):
            seen[step] = tensors["latents"]
            return {}

        samples = draw(pipe, num_inference_steps=200, callback_on_step_end=watch)
        for sigma, x in ((0.5, seen[99]), (0.25, seen[149]), (0, samples)):
            assert x.mean().item() == pytest.approx((1 - sigma) * MEAN, abs=0.02)
            assert x.std().item() == pytest.approx(np.hypot((1 - sigma) * STD, sigma), abs=0.02)

    def test_without_diffusion_it_is_the_ode(self, make_pipe):
        ode, euler = FlowMatchSDEScheduler(diffusion="none"), diffusers.FlowMatchEulerDiscreteScheduler()
        ode, euler = (make_pipe(each, transformer=GaussianDenoiser("flow")) for each in (ode, euler))
        assert torch.equal(draw(ode, num_inference_steps=5), draw(euler, sigmas=[1, 0.8, 0.6, 0.4, 0.2]))
        none = FlowMatchSDEScheduler(diffusion_scale=0.0)
        none = draw(make_pipe(none, transformer=GaussianDenoiser("flow")), num_inference_steps=5)
        torch.testing.assert_close(none, draw(ode, num_inference_steps=5))

    def test_it_is_the_sampler_of_sit(self):
        """SiT counts time from noise, t = 0, to image, t = 1, and its velocity is the negative flow."""
        steps, last, generator = 10, 0.04, torch.Generator().manual_seed(0)
        scheduler = FlowMatchSDEScheduler(last_step_size=last, last_step="mean")
        scheduler.set_timesteps(steps)
        ours = expected = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        for t in scheduler.timesteps:
            ours = scheduler.step(flow_of(ours, t / 1000), t, ours, generator=generator).prev_sample
        generator.manual_seed(0)
        times = torch.linspace(0, 1 - last, steps)
        dt = times[1] - times[0]
        for i, t in enumerate(times):
            velocity, w = -flow_of(expected, 1 - t), 1 - t
            score = (t * velocity - expected) / (1 - t)
            drift = velocity + w * score
            if i == steps - 1:
                expected = expected + last * drift
            else:
                noise = torch.randn(expected.shape, generator=generator)
                expected = expected + dt * drift + (2 * w * dt) ** 0.5 * noise
        torch.testing.assert_close(ours, expected)

    def test_an_image_does_not_depend_on_its_batch(self, make_pipe):
        pipe = make_pipe(FlowMatchSDEScheduler())
        call = {"num_inference_steps": 3, "output_type": "pt"}
        seeds = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
        both = pipe([1, 2], generator=seeds(5, 6), **call).images
        torch.testing.assert_close(pipe([2], generator=seeds(6), **call).images, both[1:], rtol=0, atol=1e-5)

    def test_it_is_saved_with_the_pipeline(self, make_pipe, tmp_path):
        make_pipe(FlowMatchSDEScheduler(diffusion="constant", shift=2.0)).save_pretrained(tmp_path)
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path).scheduler
        assert isinstance(loaded, FlowMatchSDEScheduler)
        assert (loaded.config.diffusion, loaded.config.shift) == ("constant", 2.0)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            *(("diffusion", "sbdm"), ("diffusion_scale", -1.0), ("diffusion_scale", float("nan"))),
            *(("last_step_size", 0.0), ("last_step_size", 2.0), ("last_step", "tweedie")),
        ],
    )
    def test_odd_options_are_refused(self, option, value):
        with pytest.raises(ValueError, match=f"^{option} must be "):
            FlowMatchSDEScheduler(**{option: value})
