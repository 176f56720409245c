"""Guidance in the pipeline: the same pictures in any batch, saving, caches, and what is refused."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.guiders import AdaptiveProjectedGuidance, SkipLayerGuidance, TangentialClassifierFreeGuidance

from sdt_diffusion import SDTGuidance, SDTPipeline
from sdt_diffusion.sampling.generate import describe_sampling, generate
from sdt_diffusion.sdt import GUIDANCE_KINDS

STEPS = {"num_inference_steps": 3, "output_type": "latent"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def guided_pipe(make_pipe, make_model):
    """Build a pipeline with a kind of guidance."""

    def make(kind, scheduler=None, transformer=None, **options):
        guider = SDTGuidance.from_kind(kind, **{"guidance_scale": 2.5, **options})
        parts = {"guide_transformer": make_model(num_layers=1)} if guider.config.guide_model else {}
        return make_pipe(scheduler, transformer=transformer, guider=guider, **parts)

    return make


def images(pipe, **kwargs):
    return pipe([0, 3], generator=[seeded(0), seeded(1)], **{**STEPS, **kwargs}).images


@pytest.mark.parametrize("kind", GUIDANCE_KINDS)
def test_a_picture_is_the_same_in_batches_of_1_7_and_64(guided_pipe, make_model, kind):
    options = {"guidance_interval": (0.2, 1.0), "guidance_rescale": 0.5}  # all steps but the last
    pipe = guided_pipe(kind, transformer=make_model(num_layers=1), **options)
    labels = [index % 5 for index in range(64)]

    def draw(count, size):
        samples = generate(pipe, labels[:count], 7, size, output_type="np", progress=False, num_inference_steps=3)
        return np.stack([image for _, image in samples])

    reference = draw(64, 64)
    for batch_size in (1, 7):
        np.testing.assert_allclose(draw(8, batch_size), reference[:8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", GUIDANCE_KINDS)
def test_at_a_scale_of_one_every_guidance_is_none(guided_pipe, make_pipe, kind):
    torch.testing.assert_close(images(guided_pipe(kind), guidance_scale=1), images(make_pipe(), guidance_scale=1))


@pytest.mark.parametrize("kind", GUIDANCE_KINDS)
def test_every_guidance_changes_the_picture_in_its_own_way(guided_pipe, make_model, kind):
    model = make_model(in_channels=4)
    guide = {"guide_transformer": make_model(in_channels=4, num_layers=1)} if kind == "autoguidance" else {}
    scheduler, found = diffusers.FlowMatchEulerDiscreteScheduler(), {}
    for each in ("cfg", kind):
        guider = SDTGuidance.from_kind(each, guidance_scale=2.5)
        found[each] = images(SDTPipeline(model, scheduler, guider=guider, **(guide if each == kind else {})))
    plain = images(SDTPipeline(model, scheduler), guidance_scale=1)
    assert (found[kind] - plain).abs().max() > 1e-2
    assert kind == "cfg" or (found[kind] - found["cfg"]).abs().max() > 1e-2


def test_without_a_guider_guidance_is_plain_classifier_free(guided_pipe, make_pipe):
    assert torch.equal(images(guided_pipe("cfg")), images(make_pipe(), guidance_scale=2.5))


def test_a_weaker_model_that_is_the_model_does_not_guide(make_pipe, make_model):
    guider = SDTGuidance.from_kind("autoguidance", guidance_scale=3)
    pipe = make_pipe(guider=guider, guide_transformer=make_model())
    torch.testing.assert_close(images(pipe), images(make_pipe(), guidance_scale=1))


@pytest.mark.parametrize("variant", ["context", "fixed", "content", "raster"])
def test_decay_guidance_by_a_factor_of_one_does_not_guide(guided_pipe, make_pipe, make_model, variant):
    model = make_model(spatial_decay=variant)
    pipe = guided_pipe("decay", transformer=model, decay_factor=1.0)
    torch.testing.assert_close(images(pipe), images(make_pipe(transformer=model), guidance_scale=1))
    assert (images(guided_pipe("decay", transformer=model)) - images(pipe)).abs().max() > 1e-3


def test_outside_the_interval_a_step_costs_one_unguided_pass(guided_pipe, make_pipe):
    pipe, sizes = guided_pipe("cfg", guidance_interval=(0.3, 0.7)), []
    count = lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"]))  # noqa: E731
    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    pipe([0, 1], num_inference_steps=4, output_type="latent")
    assert [sigma.item() for sigma in pipe.scheduler.sigmas[:4]] == pytest.approx([1, 0.667, 0.334, 0.001], abs=1e-3)
    assert sizes == [2, 4, 4, 2]
    text = describe_sampling(pipe, {"num_inference_steps": 4})
    assert "4 steps, 6 network evaluations, guidance 2.5 (at sigma 0.3 to 0.7)" in text

    def first_step(pipe):
        seen = []
        record = lambda *step: seen.append(step[-1]["latents"])  # noqa: E731
        images(pipe, num_inference_steps=4, callback_on_step_end=record)
        return seen[0]

    assert torch.equal(first_step(pipe), first_step(make_pipe(guidance_scale=1.0)))
    whole = guided_pipe("cfg", guidance_interval=(0.0, 1.0))
    assert torch.equal(images(whole), images(guided_pipe("cfg")))


def test_a_learned_variance_is_not_guided(guided_pipe, make_model):
    model = make_model(out_channels=6)
    x, t, labels = torch.randn(2, 3, 8, 8, generator=seeded()), torch.tensor(500), torch.tensor([1, 2])
    for kind in ("cfg", "cfg_3channels", "decay"):
        pipe = guided_pipe(kind, DDPMScheduler(variance_type="learned_range"), model)
        prediction = pipe.predict(x, t, labels)
        torch.testing.assert_close(prediction[:, 3:], model(x, t, labels).sample[:, 3:])
        images(pipe)


def test_a_call_leaves_no_trace_in_the_guider(guided_pipe):
    pipe = guided_pipe("apg")
    first = images(pipe)
    images(pipe, guidance_scale=9)
    assert torch.equal(images(pipe), first)
    pipe.guider.guidance_scale = 9
    assert (images(pipe) - first).abs().max() > 1e-3
    assert pipe.guider.new().guidance_scale == 9  # it is saved too
    with pytest.raises(ValueError, match="guidance_scale must be at least 0"):
        pipe.guider.guidance_scale = -1


@pytest.mark.parametrize("kind", GUIDANCE_KINDS)
def test_guidance_is_saved_with_the_pipeline(guided_pipe, kind, tmp_path):
    pipe = guided_pipe(kind, guidance_interval=(0.3, 0.9))
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images(loaded), images(pipe))
    assert json.loads((tmp_path / "model_index.json").read_text())["guider"] == ["sdt_diffusion", "SDTGuidance"]


def test_guidance_that_was_set_later_is_saved_too(make_pipe, make_model, tmp_path):
    pipe = make_pipe()
    pipe.guider, pipe.guide_transformer = SDTGuidance.from_kind("autoguidance"), make_model(num_layers=1)
    pipe.save_pretrained(tmp_path)
    loaded = SDTPipeline.from_pretrained(tmp_path)
    assert loaded.guider.config.guide_model
    assert loaded.guide_transformer.config.num_layers == 1
    loaded.guider = loaded.guide_transformer = None
    loaded.save_pretrained(tmp_path / "without")
    assert SDTPipeline.from_pretrained(tmp_path / "without").guider is None


@pytest.mark.parametrize("guidance", [AdaptiveProjectedGuidance, TangentialClassifierFreeGuidance])
def test_guiders_of_diffusers_fit_if_they_change_no_model(make_pipe, tmp_path, guidance):
    pipe = make_pipe(guider=guidance(2.0))
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(images(loaded), images(pipe))
    assert f"guidance 2 ({guidance.__name__})" in describe_sampling(pipe, {"num_inference_steps": 3})


def test_other_guiders_are_refused(make_pipe):
    with pytest.raises(ValueError, match="SkipLayerGuidance changes the model between two forward passes"):
        make_pipe(guider=SkipLayerGuidance(2.0, skip_layer_guidance_layers=[1]))
    with pytest.raises(ValueError, match="guider must be an SDTGuidance or a guider of diffusers, not a str"):
        make_pipe(guider="cfg")
    pipe = make_pipe()
    pipe.guider = "cfg"
    with pytest.raises(ValueError, match="guider must be an SDTGuidance or a guider of diffusers, not a str"):
        images(pipe)


def test_guidance_that_the_model_cannot_give_is_refused(guided_pipe, make_pipe, make_model):
    unconditional = make_model(class_dropout_prob=0.0)
    with pytest.raises(
        ValueError, match="guidance_scale 4 needs the null class, which a model of class_dropout_prob 0"
    ):
        images(make_pipe(transformer=unconditional))
    images(make_pipe(transformer=unconditional), guidance_scale=1)
    images(guided_pipe("decay", transformer=unconditional))
    with pytest.raises(ValueError, match="needs the null class"):
        images(guided_pipe("decay", transformer=unconditional, null_class=True))
    with pytest.raises(ValueError, match="guided_channels 3 is more than the model's 1 channels"):
        images(guided_pipe("cfg_3channels", transformer=make_model(in_channels=1)))
    with pytest.raises(ValueError, match=r"the model has none \(spatial_decay 'none'\)"):
        images(guided_pipe("decay", transformer=make_model(spatial_decay="none")))


def test_guide_models_that_do_not_fit_are_refused(make_pipe, make_model):
    auto = SDTGuidance.from_kind("autoguidance")
    with pytest.raises(ValueError, match="Autoguidance needs a second, weaker model"):
        make_pipe(guider=auto)
    for config, message in (
        ({"num_classes": 7}, "guide_transformer has num_classes 7, but the transformer has 5"),
        ({"sample_size": 16}, "guide_transformer has sample_size 16, but the transformer has 8"),
        ({"in_channels": 4}, "guide_transformer has in_channels 4, but the transformer has 3"),
        ({"out_channels": 1}, "guide_transformer predicts fewer channels"),
    ):
        with pytest.raises(ValueError, match=message):
            make_pipe(guider=auto, guide_transformer=make_model(**config))
    make_pipe(guider=auto, guide_transformer=make_model(sample_size=(8, 8), out_channels=6, num_attention_heads=1))
    with pytest.raises(ValueError, match="guide_transformer must be a model of classes, not a Linear"):
        make_pipe(guider=auto, guide_transformer=torch.nn.Linear(1, 1))
    for guider in (None, SDTGuidance(), SDTGuidance.from_kind("decay")):
        with pytest.raises(ValueError, match="guide_transformer is for autoguidance"):
            make_pipe(guider=guider, guide_transformer=make_model())


def test_intervals_outside_the_schedule_are_refused(guided_pipe):
    with pytest.raises(
        ValueError, match=r"\(0.19, 1.61\) lies outside the schedule: the sigma of FlowMatch.* is 1 at"
    ):
        images(guided_pipe("cfg", guidance_interval=(0.19, 1.61)))
    with pytest.raises(ValueError, match=r"the timestep of FlowMatchEulerDiscreteScheduler is 1000 at most"):
        images(guided_pipe("cfg", guidance_interval=(0, 2000), interval_unit="timestep"))
    with pytest.raises(ValueError, match=r"holds none of the 3 steps, whose sigma is between 0.001 and 1"):
        images(guided_pipe("cfg", guidance_interval=(0.6, 0.7)))
    images(guided_pipe("cfg", DDPMScheduler(), guidance_interval=(0.19, 5.0)))


@pytest.mark.parametrize("kind", ["cfg", "decay"])
def test_caches_keep_steps_with_and_without_guidance_apart(guided_pipe, kind):
    for config in (
        FirstBlockCacheConfig(threshold=1e6),
        TaylorSeerCacheConfig(3, disable_cache_before_step=1, cache_identifiers=["transformer_blocks.*attn"]),
    ):
        pipe = guided_pipe(kind, guidance_interval=(0.3, 0.7))
        exact = images(pipe, num_inference_steps=12)
        pipe.transformer.enable_cache(config)
        cached = images(pipe, num_inference_steps=12)
        assert 1e-4 < (cached - exact).abs().max() < 0.5 * exact.abs().max()
        assert torch.equal(images(pipe, num_inference_steps=12), cached)


def test_caches_of_diffusers_follow_the_timesteps(guided_pipe, make_pipe, make_model):
    for config in (
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_block_identifiers=["transformer_blocks.*attn"]
        ),
        FasterCacheConfig(
            spatial_attention_block_identifiers=["transformer_blocks.*attn"],
            tensor_format="BCHW",
            _unconditional_conditional_input_kwargs_identifiers=("hidden_states", "timestep", "class_labels"),
        ),
    ):
        pipe, seen = make_pipe(transformer=make_model()), []
        config.current_timestep_callback = lambda pipe=pipe, seen=seen: seen.append(pipe.current_timestep) or seen[-1]
        exact = images(pipe, num_inference_steps=8)
        pipe.transformer.enable_cache(config)
        cached = images(pipe, num_inference_steps=8)
        assert {float(timestep) for timestep in seen} == set(pipe.scheduler.timesteps.tolist())
        assert pipe.current_timestep is None
        assert 1e-4 < (cached - exact).abs().max() < 0.5 * exact.abs().max()
        pipe.guider = SDTGuidance(guidance_interval=(0.3, 0.7))
        with pytest.raises(ValueError, match=f"{type(config).__name__} needs batches of one size"):
            images(pipe)
