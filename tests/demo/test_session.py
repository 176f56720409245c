"""Test what the page of the demo computes."""

import contextlib

import diffusers
import numpy as np
import pytest
import torch

from sdt_diffusion.demo.session import (
    NUM_MOMENTS,
    draw_view,
    grid_of,
    num_blocks_of,
    sample_in_steps,
    usable_guidance,
)
from sdt_diffusion.sampling.generate import generate
from sdt_diffusion.sampling.settings import SamplerArguments
from sdt_diffusion.sdt.guidance import GUIDANCE_KINDS, SDTGuidance, sigma_at


def last_of(pipe, label=1, num_pictures=2, seed=3, **sampler):
    sampler = {"num_inference_steps": 4, **sampler}
    *_, run = sample_in_steps(pipe, label, num_pictures, seed, SamplerArguments(**sampler))
    return run


def same(pictures, others):
    return all(np.array_equal(a, b) for a, b in zip(pictures, others, strict=True))


def test_the_pictures_are_those_of_the_sampling_script(make_pipe):
    pipe = make_pipe()
    run = last_of(pipe, guidance_scale=2.0)
    samples = generate(pipe, [1, 1], seed=3, guidance_scale=2.0, num_inference_steps=4, progress=False)
    assert same(run.pictures, [picture for _, picture in samples])
    assert (run.finished, run.class_name, run.step, run.num_steps) == (True, "bee, honey bee", 4, 4)
    assert "4 steps, 8 network evaluations, guidance 2, seed 3" in run.sampler


def test_only_guidance_that_the_model_can_use_is_offered(make_pipe, make_model):
    """Each kind that is offered samples, and none other does, but the one that is plain guidance of three channels."""
    guided = {"guider": SDTGuidance.from_kind("autoguidance"), "guide_transformer": make_model(num_layers=1)}
    for pipe, expected in (
        (make_pipe(), ["cfg", "apg", "decay"]),
        (make_pipe(transformer=make_model(in_channels=1)), ["cfg", "apg", "decay"]),
        (make_pipe(**guided), ["cfg", "apg", "autoguidance", "decay"]),
        (make_pipe(transformer=make_model(spatial_decay="none")), ["cfg", "apg"]),
        (make_pipe(transformer=make_model(class_dropout_prob=0.0)), ["decay"]),
        (make_pipe(transformer=make_model(class_dropout_prob=0.0, spatial_decay="none")), []),
    ):
        assert usable_guidance(pipe) == expected
        sampled = []
        for kind in GUIDANCE_KINDS:
            with contextlib.suppress(ValueError):
                last_of(pipe, guidance=kind, guidance_scale=2.0, num_inference_steps=1, num_pictures=1)
                sampled.append(kind)
        assert set(sampled) - {"cfg_3channels"} == set(expected)


def test_latents_of_four_channels_can_be_guided_in_three(make_pipe, make_model, tiny_vae):
    pipe = make_pipe(transformer=make_model(in_channels=4), vae=tiny_vae)
    assert usable_guidance(pipe) == ["cfg", "cfg_3channels", "apg", "decay"]


def test_the_run_is_seen_after_each_step(make_pipe):
    seen = []
    for run in sample_in_steps(make_pipe(), 0, 1, 0, SamplerArguments(num_inference_steps=20)):
        seen.append((run.step, run.finished))
        assert run.finished or run.pictures is run.moments[-1].pictures
    assert [finished for _, finished in seen] == [*[False] * (len(seen) - 1), True]
    assert len(seen) == 21
    assert len(run.moments) == NUM_MOMENTS
    assert run.moments[0].timestep == 1000
    assert [m.timestep for m in run.moments] == sorted((m.timestep for m in run.moments), reverse=True)


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), None),
        (diffusers.DDIMScheduler(clip_sample=False), None),
        (diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), "EulerDiscreteScheduler"),
    ],
)
def test_the_clean_image_of_a_perfect_model_is_the_image(make_pipe, scheduler, name, monkeypatch):
    """A model that knows the image shows it from the first step, whatever it predicts."""
    pipe = make_pipe(scheduler)
    image = torch.linspace(-0.9, 0.9, 3 * 8 * 8).view(1, 3, 8, 8)

    def predict(self, latents, timestep, class_labels, end):
        sigma = sigma_at(self.scheduler, float(timestep))
        if self.objective["prediction_type"] == "flow_prediction":
            return (latents - image) / sigma
        a, s = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
        noise = (latents - a * image) / s
        return noise if self.objective["prediction_type"] == "epsilon" else a * noise - s * image

    monkeypatch.setattr(type(pipe), "predict", predict)
    run = last_of(pipe, num_pictures=1, scheduler=name, num_inference_steps=5)
    expected = pipe.image_processor.postprocess(image)
    for moment in run.moments:
        difference = np.asarray(moment.pictures[0], dtype=int) - np.asarray(expected[0], dtype=int)
        assert abs(difference).max() <= 1


def test_the_recorded_input_is_what_the_model_saw(make_pipe):
    pipe, seen = make_pipe(), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    run = last_of(pipe, guidance_scale=2.0, scheduler="FlowMatchHeunDiscreteScheduler")
    assert len(seen) == 7
    for moment, step in zip(run.moments, (0, 1, 2, 4, 5, 6), strict=True):
        assert torch.equal(moment.model_input, seen[step][2:])  # after the half without the class


def test_settings_of_a_run_do_not_stay(make_pipe):
    pipe = make_pipe(num_inference_steps=3)
    scheduler = pipe.scheduler
    last_of(pipe, guidance="apg", guidance_interval=[0.1, 0.9], scheduler="FlowMatchHeunDiscreteScheduler")
    assert pipe.scheduler is scheduler
    assert pipe.guider is None
    assert pipe.sampling_settings()["num_inference_steps"] == 3


def test_a_viewer_who_leaves_stops_the_run(make_pipe):
    pipe, calls = make_pipe(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    watched = sample_in_steps(pipe, 0, 1, 0, SamplerArguments(num_inference_steps=500, guidance_scale=1.0))
    next(watched)
    watched.close()
    assert len(calls) < 500
    assert last_of(pipe).finished


@pytest.mark.parametrize(
    ("model", "wrong", "message"),
    [
        ({}, {"label": 5}, "Class label 5 is out of range"),
        ({}, {"seed": -1}, "seed must be at least 0"),
        ({}, {"seed": None}, "seed must be a whole number"),
        ({}, {"num_pictures": 0}, "num_pictures must be at least 1 and at most 16"),
        ({}, {"num_pictures": 2.5}, "num_pictures must be a whole number"),
        ({}, {"guidance_interval": [3.0, 5.0]}, "lies outside the schedule"),
        ({}, {"guidance_interval": [0.01, 0.02], "guidance_scale": 2.0}, "holds none of the 4 steps"),
        ({}, {"guidance": "autoguidance"}, "autoguidance needs a guide_model"),
        ({}, {"scheduler": "DDIMScheduler"}, "is not a scheduler for this flow-matching model"),
        ({"class_dropout_prob": 0.0}, {"guidance_scale": 2.0}, "needs the null class"),
        ({"spatial_decay": "none"}, {"guidance": "decay", "guidance_scale": 2.0}, "the model has none"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_the_first_step(make_pipe, make_model, model, wrong, message):
    pipe = make_pipe(transformer=make_model(**model))
    pipe.transformer.register_forward_hook(lambda *_: pytest.fail("the model was called"))
    with pytest.raises(ValueError, match=message):
        last_of(pipe, **wrong)


def test_errors_of_the_model_reach_the_viewer(make_pipe):
    pipe = make_pipe()
    pipe.transformer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last_of(pipe)


def test_a_view_has_a_row_for_each_moment_and_a_map_for_each_head(make_pipe, monkeypatch):
    drawn = []
    monkeypatch.setattr("sdt_diffusion.demo.session.plot_decays", lambda *args: drawn.append(args))
    monkeypatch.setattr("sdt_diffusion.demo.session.Image.open", lambda file: file)
    pipe = make_pipe(guider=SDTGuidance(2.0))
    run = last_of(pipe)
    draw_view(run, 1, (2, 3), 1)
    ((section,), title, _, _) = drawn[0]
    assert title == "a sample of the class 'bee, honey bee', seed 3, picture 1"
    assert section.title == "block 1: 4 x 4 patches, context"
    assert len(section.rows) == len(run.moments) == 4
    for row, moment in zip(section.rows, run.moments, strict=True):
        assert row.patch == (2, 3)
        assert row.picture is moment.pictures[1]
        assert row.maps.shape == (2, 4, 4)
        np.testing.assert_allclose(row.maps[:, 2, 3], 1)  # a patch sees itself
    assert not np.allclose(section.rows[0].maps, section.rows[-1].maps)


def test_what_cannot_be_viewed_is_refused(make_pipe, make_model):
    run = last_of(make_pipe(), num_inference_steps=1)
    for place, message in (
        ((2, (0, 0), 0), "picture must be one of the 2 of the run"),
        ((0, (4, 0), 0), "patches must be on the grid of 4 x 4"),
        ((0, (0, 0), 2), "There is no block 2"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_view(run, *place)
    run = last_of(make_pipe(transformer=make_model(spatial_decay="none")), num_inference_steps=1)
    with pytest.raises(ValueError, match="there is no decay to draw"):
        draw_view(run, 0, (0, 0), 0)


def test_grid_and_blocks(make_pipe, make_model):
    pipe = make_pipe(transformer=make_model(sample_size=(8, 16), num_layers=3))
    assert grid_of(pipe) == (4, 8)
    assert num_blocks_of(pipe) == 3
