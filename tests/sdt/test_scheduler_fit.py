"""Which schedulers and steps pipelines take, and which they refuse."""

import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from sdt_diffusion import SDTPipeline, swap_scheduler
from sdt_diffusion.sdt.schedulers import (
    DIFFUSION_SCHEDULERS,
    FLOW_SCHEDULERS,
    UNFIT_OPTIONS,
    check_fits,
    objective_of,
)
from sdt_diffusion.sdt.steps import set_schedule

from .gaussian import MEAN, STD, GaussianDenoiser, draw, flow_of, saved_scheduler


class TestFit:
    """`pipe.scheduler = X.from_config(pipe.scheduler.config)` works, or is refused at the call."""

    @pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
    @pytest.mark.parametrize("name", [name for name in dir(diffusers) if name.endswith("Scheduler")])
    def test_the_habit_samples_the_gaussian_or_is_refused(self, make_pipe, name, kind):
        pipe = make_pipe(saved_scheduler(kind), transformer=GaussianDenoiser(kind))
        try:
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        except (ImportError, AttributeError, TypeError, ValueError):
            return  # no scheduler, or one that cannot be made here
        known = FLOW_SCHEDULERS if kind == "flow" else DIFFUSION_SCHEDULERS
        try:
            check_fits(pipe.scheduler, pipe.objective)
        except ValueError:
            with pytest.raises(ValueError, match=r"pipe\.swap_scheduler\("):
                draw(pipe, num_inference_steps=50)
            if name not in known:
                return
            pipe.swap_scheduler(name)
        samples = draw(pipe, num_inference_steps=50)
        assert name in known
        assert samples.mean().item() == pytest.approx(MEAN, abs=0.06)
        assert samples.std().item() == pytest.approx(STD, abs=0.06)

    @pytest.mark.parametrize(
        ("scheduler", "reason"),
        [
            (diffusers.DDIMScheduler(beta_end=0.012, beta_start=0.00085), "has other noise levels"),
            (diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "has other noise levels"),
            (diffusers.DDIMScheduler(num_train_timesteps=500), "has other noise levels"),
            (diffusers.DDIMScheduler(rescale_betas_zero_snr=True), "has other noise levels"),
            (
                diffusers.DDIMScheduler(prediction_type="v_prediction"),
                "is set to sample from v_prediction models",
            ),
            (diffusers.FlowMatchEulerDiscreteScheduler(), "does not sample from epsilon models"),
            (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), r"uses other .*use_flow_sigmas is true"),
            (diffusers.LCMScheduler(), "is for distilled consistency models"),
            (diffusers.IPNDMScheduler(), "has a noise schedule of its own"),
        ],
    )
    def test_schedulers_of_other_models_are_refused(self, make_pipe, scheduler, reason):
        pipe = make_pipe(saved_scheduler("epsilon"), transformer=GaussianDenoiser("epsilon"))
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=f"^{type(scheduler).__name__} {reason}"):
            draw(pipe, num_inference_steps=2)

    def test_a_flow_of_other_sigmas_is_refused(self, make_pipe):
        pipe = make_pipe(saved_scheduler("flow"))
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")
        with pytest.raises(ValueError, match=r"use_flow_sigmas is false.*pipe\.swap_scheduler\('DPMSolver"):
            draw(pipe, num_inference_steps=2)

    @pytest.mark.parametrize("option", UNFIT_OPTIONS)
    def test_options_of_other_models_are_refused_with_what_to_do(self, make_pipe, option):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{option: True})
        pipe = make_pipe(scheduler, transformer=GaussianDenoiser("flow"), objective=objective_of(scheduler))
        message = rf"^FlowMatchEulerDiscreteScheduler with {option} .*pipe\.swap_scheduler\('FlowMatchEuler"
        with pytest.raises(ValueError, match=message):
            draw(pipe, num_inference_steps=2)
        pipe.swap_scheduler("FlowMatchEulerDiscreteScheduler")
        draw(pipe, num_inference_steps=2)

    @pytest.mark.parametrize(
        "options",
        [
            *({f"use_{spacing}_sigmas": True} for spacing in ("karras", "exponential", "beta")),
            {"shift_terminal": 0.02},
            {"time_shift_type": "linear"},
        ],
        ids=str,
    )
    def test_other_options_of_flow_matching_sample_the_gaussian(self, make_pipe, options):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        samples = draw(make_pipe(scheduler, transformer=GaussianDenoiser("flow")), num_inference_steps=100)
        assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
        assert samples.std().item() == pytest.approx(STD, abs=0.02)

    def test_swapping_keeps_the_options_of_a_scheduler_that_fits_and_drops_those_of_another(self, make_pipe):
        pipe = make_pipe(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
        pipe.swap_scheduler("FlowMatchSDEScheduler", diffusion="constant")
        assert pipe.scheduler.config.shift == 3.0
        assert pipe.scheduler.config.diffusion == "constant"
        pipe.scheduler = diffusers.DDIMScheduler(beta_end=0.5)
        pipe.swap_scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True)
        assert pipe.scheduler.config.use_karras_sigmas
        assert objective_of(pipe.scheduler) == pipe.objective

    def test_a_scheduler_of_ones_own_is_taken_if_its_noise_levels_are_the_models(self, make_pipe):
        class Own(diffusers.DDIMScheduler):
            pass

        pipe = make_pipe(saved_scheduler("epsilon"), transformer=GaussianDenoiser("epsilon"))
        pipe.scheduler = Own(clip_sample=False)
        draw(pipe, num_inference_steps=2)

    def test_the_objective_is_saved_and_outlives_the_scheduler(self, make_pipe, tmp_path):
        pipe = make_pipe(saved_scheduler("v_prediction"))
        pipe.scheduler = diffusers.DDIMScheduler()
        pipe.save_pretrained(tmp_path)
        loaded = SDTPipeline.from_pretrained(tmp_path)
        assert loaded.objective == objective_of(saved_scheduler("v_prediction"))
        with pytest.raises(ValueError, match="DDIMScheduler is set to sample from epsilon models"):
            loaded([0])

    def test_folders_without_an_objective_have_that_of_their_scheduler(self, make_pipe, tmp_path):
        make_pipe().save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        del index["objective"], index["uniform_sigmas"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        assert SDTPipeline.from_pretrained(tmp_path).objective == objective_of(saved_scheduler("flow"))
        assert not SDTPipeline.from_pretrained(tmp_path).config.uniform_sigmas
        for kind in (SDTPipeline, diffusers.DiffusionPipeline):
            other = kind.from_pretrained(tmp_path, scheduler=diffusers.DDIMScheduler())
            with pytest.raises(ValueError, match="DDIMScheduler does not sample from flow-matching models"):
                other([0])
            other.swap_scheduler("UniPCMultistepScheduler")
            other([0], num_inference_steps=2)
            other.save_pretrained(tmp_path / "again")
            again = kind.from_pretrained(tmp_path / "again")
            assert again.objective == objective_of(saved_scheduler("flow"))

    @pytest.mark.parametrize(
        "objective",
        [
            "flow",
            {},
            {"prediction_type": "epsilon"},
            {"prediction_type": "score", "num_train_timesteps": 1000},
            {"prediction_type": "epsilon", "num_train_timesteps": 0},
            {"prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_end": "many"},
            {"prediction_type": "epsilon", "num_train_timesteps": 1000, "shift": 2.0},
            {"prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_schedule": "steep"},
        ],
    )
    def test_odd_objectives_are_refused(self, make_pipe, objective):
        with pytest.raises(ValueError, match=r"objective (must|holds|makes)|^The scheduler's (pred|num_tr|beta_end)"):
            make_pipe(objective=objective)

    def test_a_variance_that_the_model_does_not_predict_is_refused(self, make_pipe):
        pipe = make_pipe(diffusers.DDPMScheduler(variance_type="learned_range"))
        with pytest.raises(ValueError, match="needs a model that predicts the variance: 6 out_channels"):
            pipe([0])


def test_the_examples_of_the_page_run(make_pipe, make_model):
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page[: page.index("## How attention")], re.DOTALL)
    assert len(examples) == 6
    names = {"pipe": make_pipe(transformer=make_model(num_classes=8), id2label=None, num_inference_steps=2)}
    for example in examples:
        exec(example, names)
        names["pipe"](0)
    assert len(names["images"]) == 2
    rows = set(re.findall(r"^\| (\w+) \|", page, re.MULTILINE))
    assert {*DIFFUSION_SCHEDULERS, *FLOW_SCHEDULERS} <= rows


class TestSteps:
    def test_uniform_sigmas_are_the_euler_steps_of_sit(self, make_pipe):
        pipe = make_pipe(saved_scheduler("flow"), transformer=GaussianDenoiser("flow"), uniform_sigmas=True)
        start = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        expected = start
        for i in range(5):
            expected = expected - flow_of(expected, 1 - i / 5) / 5
        found = draw(pipe, latents=start, num_inference_steps=5)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        assert torch.equal(found, draw(pipe, latents=start, sigmas=np.array([1, 0.8, 0.6, 0.4, 0.2])))

    def test_steps_of_heun_end_at_the_image(self):
        euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler = swap_scheduler(euler, "FlowMatchHeunDiscreteScheduler")
        set_schedule(scheduler, 3, uniform=True)
        levels = [1, 6 / 7, 6 / 7, 3 / 5, 3 / 5]
        assert scheduler.sigmas.tolist() == pytest.approx([*levels, 0])
        assert scheduler.timesteps.tolist() == pytest.approx([1000 * level for level in levels])

    @pytest.mark.parametrize("name", FLOW_SCHEDULERS)
    def test_no_noise_stays_in_an_image(self, name):
        """If all images are alike, the flow points away from them, and every step of it leads there."""
        scheduler = swap_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), name)
        set_schedule(scheduler, 5, uniform=True)
        x = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(1000 / t * (x - MEAN), t, x, return_dict=False)[0]
        assert (x - MEAN).abs().max() < 0.02

    def test_pipelines_of_before_keep_their_steps(self, make_pipe):
        pipe = make_pipe(saved_scheduler("flow"), transformer=GaussianDenoiser("flow"))
        draw(pipe, num_inference_steps=4)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx([1, 0.667, 0.334, 0.001, 0])

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    @pytest.mark.parametrize(
        "name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchSDEScheduler", "UniPCMultistepScheduler"]
    )
    def test_timesteps_of_flows_are_those_that_the_model_sees(self, name, shift):
        scheduler = swap_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), name)
        assert set_schedule(scheduler, None, timesteps=[900, 450.5, 100]) == 3
        assert scheduler.timesteps.tolist() == pytest.approx([900, 450.5, 100], abs=1)
        assert scheduler.sigmas.tolist() == pytest.approx([0.9, 0.4505, 0.1, 0], abs=1e-4)

    @pytest.mark.parametrize(
        "name", ["DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
    )
    def test_timesteps_of_diffusion_are_taken(self, make_pipe, name):
        pipe = make_pipe(swap_scheduler(saved_scheduler("epsilon"), name), transformer=GaussianDenoiser("epsilon"))
        draw(pipe, timesteps=torch.tensor([999, 500, 20]))
        assert pipe.scheduler.timesteps.unique().tolist() == [20, 500, 999]
        draw(pipe, num_inference_steps=3)  # and forgotten

    def test_sigmas_of_euler_are_noise_over_image(self, make_pipe):
        scheduler = swap_scheduler(saved_scheduler("epsilon"), "EulerDiscreteScheduler")
        draw(make_pipe(scheduler, transformer=GaussianDenoiser("epsilon")), sigmas=[80, 10, 1])
        assert scheduler.sigmas.tolist() == [80, 10, 1, 0]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"sigmas": [1, 0.5], "timesteps": [1000, 500]}, "leave one out"),
            ({"sigmas": [0.5, 1]}, r"sigmas must decrease, from noise to image, but are \[0.5, 1\]"),
            ({"sigmas": [0.5, 0.5]}, "sigmas must decrease"),
            ({"sigmas": [1.5, 0.5]}, "sigmas must be more than 0 and at most 1, not 1.5"),
            ({"sigmas": [1, 0]}, "sigmas must be more than 0 and at most 1, not 0"),
            ({"sigmas": [1, float("nan")]}, "sigmas must be a finite number, not nan"),
            ({"sigmas": []}, r"sigmas must be a list of numbers, not \[\]"),
            ({"sigmas": 0.5}, "sigmas must be a list of numbers, not 0.5"),
            ({"sigmas": "1, 0.5"}, "sigmas must be a list of numbers"),
            ({"sigmas": [[1.0], [0.5]]}, r"sigmas must be a number, not \[1.0\]"),
            ({"timesteps": [1001, 500]}, "timesteps must be more than 0 and at most 1000, not 1001"),
            ({"sigmas": [1, 0.5], "num_inference_steps": 3}, "sigmas are 2, but num_inference_steps is 3"),
        ],
    )
    def test_odd_steps_are_refused(self, make_pipe, call, message):
        pipe = make_pipe(saved_scheduler("flow"), transformer=GaussianDenoiser("flow"))
        with pytest.raises(ValueError, match=message):
            draw(pipe, **call)

    @pytest.mark.parametrize(
        ("kind", "name", "call", "message"),
        [
            ("flow", "FlowMatchHeunDiscreteScheduler", {"sigmas": [1, 0.5]}, "takes no sigmas"),
            ("flow", "DPMSolverMultistepScheduler", {"timesteps": [900, 500]}, "takes no timesteps"),
            ("epsilon", "DDIMScheduler", {"timesteps": [900, 500]}, "takes no timesteps"),
            ("epsilon", "DDPMScheduler", {"sigmas": [1, 0.5]}, "takes no sigmas"),
            ("epsilon", "UniPCMultistepScheduler", {"sigmas": [1, 0.5]}, "takes no sigmas"),
            ("epsilon", "DDPMScheduler", {"timesteps": [900, 500.5]}, "timesteps must be a whole number, not 500.5"),
            ("epsilon", "DDPMScheduler", {"timesteps": [1000, 500]}, "timesteps must be at least 0 and at most 999"),
        ],
    )
    def test_schedulers_that_do_not_take_them_say_so(self, make_pipe, kind, name, call, message):
        pipe = make_pipe(swap_scheduler(saved_scheduler(kind), name), transformer=GaussianDenoiser(kind))
        with pytest.raises(ValueError, match=message):
            draw(pipe, **call)
