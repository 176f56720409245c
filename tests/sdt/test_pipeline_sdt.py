import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
)

from sdt_diffusion import SDTPipeline

STEPS = {"num_inference_steps": 3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_output_types_agree(make_pipe):
    pipe = make_pipe()
    images = {
        t: pipe([0, 1], generator=seeded(), output_type=t, **STEPS).images for t in ("latent", "pt", "np", "pil")
    }
    assert images["latent"].shape == images["pt"].shape == (2, 3, 8, 8)
    pixels = (images["latent"] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images["pt"], pixels)
    np.testing.assert_allclose(images["np"], pixels.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert np.array_equal(np.array(images["pil"][1]), (images["np"][1] * 255).round().astype("uint8"))
    assert isinstance(pipe([0], return_dict=False, **STEPS), tuple)


@pytest.mark.parametrize(
    "labels", [3, "dog", [3], ["dog"], torch.tensor([3]), np.array([3]), np.int64(3), (3,), [[3]]]
)
def test_a_class_may_be_given_in_many_forms(make_pipe, labels):
    pipe = make_pipe()
    expected = pipe([3], generator=seeded(), output_type="pt", **STEPS).images
    assert torch.equal(pipe(labels, generator=seeded(), output_type="pt", **STEPS).images, expected)


def test_labels_may_be_nested_once(make_pipe):
    assert make_pipe().prepare_class_labels([[1], [2, "elk"]]) == [1, 2, 4]
    assert make_pipe().prepare_class_labels(torch.tensor([[1], [2]])) == [1, 2]


def test_every_word_of_a_class_name_is_known(make_pipe):
    assert make_pipe().get_label_ids(["bee", "honey bee", "bee, honey bee", "elk"]) == [1, 1, 1, 4]


def test_a_full_name_wins_over_a_word_and_shared_words_are_refused(make_model):
    names = {0: "maillot", 1: "maillot, tank suit", 2: "crane", 3: "crane", 4: "tank, suit"}
    pipe = SDTPipeline(make_model(), DDIMScheduler(), id2label=names)
    assert pipe.get_label_ids(["maillot", "tank suit", "tank"]) == [0, 1, 4]
    with pytest.raises(ValueError, match="'crane' is a name of the classes 2, 3: give the id"):
        pipe.get_label_ids("crane")


def test_learned_variance_under_a_scheduler_that_cuts_it_is_refused(make_pipe, make_model):
    scheduler = DPMSolverMultistepScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match=r"cuts predictions to three channels.*swap_scheduler"):
        make_pipe(scheduler, transformer=make_model(out_channels=6))([0])


def test_guidance_extrapolates_all_channels_from_the_null_class(make_pipe):
    pipe = make_pipe()
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor(500.0), torch.tensor([1, 2])
    predict = lambda y: pipe.transformer(x, t, y, return_dict=False)[0]  # noqa: E731
    cond, uncond = predict(labels), predict(torch.tensor([5, 5]))
    pipe._guidance_scale = 3.0
    torch.testing.assert_close(pipe.predict(x, t, labels), uncond + 3 * (cond - uncond))
    pipe._guidance_scale = 1.0
    torch.testing.assert_close(pipe.predict(x, t, labels), cond)


def test_guidance_of_one_asks_for_no_null_class(make_pipe):
    pipe = make_pipe()
    sizes = []
    count = lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"]))  # noqa: E731
    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    pipe([0, 1], guidance_scale=1.0, **STEPS)
    pipe([0, 1], guidance_scale=1.5, **STEPS)
    assert sizes == [2, 2, 2, 4, 4, 4]


def test_learned_variance_is_passed_to_ddpm_only(make_pipe, make_model):
    model = make_model(out_channels=6)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor(500), torch.tensor([1, 2])
    for scheduler, channels in (
        (DDPMScheduler(variance_type="learned_range"), 6),
        (DDPMScheduler(), 3),
        (DDIMScheduler(), 3),
    ):
        pipe = make_pipe(scheduler, transformer=model)
        pipe._guidance_scale = 2.0
        prediction = pipe.predict(x, t, labels)
        assert prediction.shape[1] == channels
        if channels == 6:  # the variance is the conditional branch's, unguided
            torch.testing.assert_close(prediction[:, 3:], model(x, t, labels).sample[:, 3:])
        pipe([0], **STEPS)


def test_a_generator_per_image_makes_images_independent_of_the_batch(make_pipe):
    pipe = make_pipe(DDPMScheduler())  # noise at every step
    together = pipe([0, 1, 2], generator=[seeded(i) for i in range(3)], output_type="pt", **STEPS).images
    alone = pipe([1], generator=[seeded(1)], output_type="pt", **STEPS).images
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)


def test_num_images_per_prompt_repeats_each_label(make_pipe):
    pipe = make_pipe()
    twice = pipe([2, 4], num_images_per_prompt=2, generator=[seeded(i) for i in range(4)], output_type="pt", **STEPS)
    repeated = pipe([2, 2, 4, 4], generator=[seeded(i) for i in range(4)], output_type="pt", **STEPS)
    assert torch.equal(twice.images, repeated.images)


def test_callback_sees_every_step_and_may_replace_latents_and_guidance(make_pipe):
    pipe = make_pipe()
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append((step, float(timestep)))
        pipe._guidance_scale = 1.0
        return {"latents": torch.zeros_like(kwargs["latents"])}

    latents = pipe([0], callback_on_step_end=callback, output_type="latent", **STEPS).images
    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000
    assert torch.equal(latents, torch.zeros_like(latents))
    assert pipe.num_timesteps == 3
    assert not pipe.do_classifier_free_guidance


def test_a_callback_may_return_nothing_and_may_interrupt(make_pipe):
    pipe = make_pipe()
    steps = []

    def callback(pipe, step, timestep, kwargs):
        steps.append(step)
        pipe._interrupt = step == 1

    pipe([0], num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1]
    pipe([0], num_inference_steps=5, callback_on_step_end=lambda *_: steps.append("again"))
    assert steps[2:] == ["again"] * 5


def test_caches_work_in_the_pipeline(make_pipe, make_model):
    pipe = make_pipe(transformer=make_model(num_layers=3))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    calls = []
    pipe.transformer.transformer_blocks[2].ff.register_forward_hook(lambda *_: calls.append(1))
    pipe([0], num_inference_steps=4)
    assert len(calls) == 1


def test_given_latents_replace_the_noise(make_pipe):
    pipe = make_pipe()
    noise = torch.randn(1, 3, 8, 8, generator=seeded())
    drawn = pipe([0], generator=seeded(), output_type="pt", **STEPS).images
    assert torch.equal(pipe([0], latents=noise, output_type="pt", **STEPS).images, drawn)


def test_initial_noise_has_the_schedulers_sigma(make_pipe):
    pipe = make_pipe(diffusers.EulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(3)
    latents = pipe.prepare_latents(1, 8, 8, seeded(), None)
    expected = torch.randn(1, 3, 8, 8, generator=seeded()) * pipe.scheduler.init_noise_sigma
    torch.testing.assert_close(latents, expected)
    assert pipe.scheduler.init_noise_sigma > 5


@pytest.mark.parametrize("size", [{"height": 4, "width": 12}, {"height": 16}])
def test_other_sizes(make_pipe, size):
    image = make_pipe()([0], output_type="pt", **size, **STEPS).images
    assert image.shape[-2:] == (size["height"], size.get("width", 8))


def test_second_order_schedulers_fill_the_progress_bar(make_pipe, capsys):
    pipe = make_pipe(diffusers.HeunDiscreteScheduler())
    pipe.set_progress_bar_config(disable=False)
    pipe([0], num_inference_steps=4)
    assert "4/4" in capsys.readouterr().err


class TestWithVAE:
    @pytest.fixture
    def pipe(self, make_pipe, make_model, tiny_vae):
        return make_pipe(transformer=make_model(in_channels=4), vae=tiny_vae)

    def test_decodes_latents_scaled_and_shifted(self, pipe, tiny_vae):
        latents = pipe([0], generator=seeded(), output_type="latent", **STEPS).images
        assert latents.shape == (1, 4, 8, 8)
        pixels = pipe([0], generator=seeded(), output_type="pt", **STEPS).images
        expected = tiny_vae.decode(latents / 0.5 + 0.25).sample
        torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1))
        assert pixels.shape == (1, 3, 16, 16)

    def test_saves_and_loads(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        expected = pipe([0], generator=seeded(), output_type="pt", **STEPS).images
        assert torch.equal(loaded([0], generator=seeded(), output_type="pt", **STEPS).images, expected)

    @pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
    def test_without_it_latents_are_not_taken_for_pictures(self, pipe, tiny_vae, tmp_path, output_type):
        plain = SDTPipeline(pipe.transformer, pipe.scheduler)
        with pytest.raises(ValueError, match="latents of 4 channels, and the pipeline has no VAE"):
            plain([0], output_type=output_type)
        plain.save_pretrained(tmp_path)
        decoded = SDTPipeline.from_pretrained(tmp_path, vae=tiny_vae)
        expected = pipe([0], generator=seeded(), output_type="pt", **STEPS).images
        assert torch.equal(decoded([0], generator=seeded(), output_type="pt", **STEPS).images, expected)

    def test_a_vae_that_is_set_later_decides_the_size_of_images(self, pipe, tiny_vae):
        later = SDTPipeline(pipe.transformer, pipe.scheduler)
        later.vae = tiny_vae
        assert later.vae_scale_factor == later.image_processor.config.vae_scale_factor == 2
        assert later.check_inputs() == (16, 16)
        expected = pipe([0], generator=seeded(), output_type="pt", **STEPS).images
        assert torch.equal(later([0], generator=seeded(), output_type="pt", **STEPS).images, expected)

    def test_sizes_must_be_whole_patches_of_latents(self, pipe):
        with pytest.raises(ValueError, match=r"multiples of 4 \(patch_size 2, VAE factor 2\)"):
            pipe([0], height=18)


def test_loads_in_a_fresh_process(make_pipe, tmp_path):
    pipe = make_pipe(DPMSolverMultistepScheduler())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "SDTPipeline"
    assert index["transformer"] == ["sdt_diffusion", "SDTTransformer2DModel"]
    code = (
        "import sys, torch, sdt_diffusion\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "g = torch.Generator().manual_seed(0)\n"
        "torch.set_num_threads(1)\n"
        "images = pipe(['bee', 4], num_inference_steps=3, generator=g, output_type='pt').images\n"
        "torch.save((type(pipe).__name__, type(pipe.scheduler).__name__, images), sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, tmp_path / "out.pt"], check=True, timeout=120)
    name, scheduler, images = torch.load(tmp_path / "out.pt")
    assert (name, scheduler) == ("SDTPipeline", "DPMSolverMultistepScheduler")
    assert torch.equal(images, pipe([1, 4], generator=seeded(), output_type="pt", **STEPS).images)


def test_class_names_survive_saving(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path)
    loaded = SDTPipeline.from_pretrained(tmp_path)
    assert loaded.labels == make_pipe().labels


class TestBadInput:
    @pytest.mark.parametrize("label", [-1, 5, 1000])
    def test_label_out_of_range(self, make_pipe, label):
        with pytest.raises(ValueError, match=rf"Class label {label} is out of range: the model has labels 0\.\.4"):
            make_pipe()([0, label])

    def test_unknown_class_name(self, make_pipe):
        with pytest.raises(
            ValueError, match=r"Unknown class name\(s\) 'wolf'\. Known names: 'ant', 'bee, honey bee', 'cat'"
        ):
            make_pipe()(["ant", "wolf"])

    @pytest.mark.parametrize("label", [1.0, True, None, [[1.0]], [[[1]]]])
    def test_label_of_a_wrong_type(self, make_pipe, label):
        with pytest.raises(ValueError, match="must be an integer or a class name"):
            make_pipe()(label)

    def test_others(self, make_pipe):
        pipe = make_pipe()
        with pytest.raises(ValueError, match="class_labels is empty"):
            pipe([])
        with pytest.raises(ValueError, match="image of 7x8 is not divisible into patches"):
            pipe([0], height=7)
        with pytest.raises(ValueError, match="Unknown output_type 'jpg'"):
            pipe([0], output_type="jpg")
        with pytest.raises(ValueError, match="2 generators were given for a batch of 1"):
            pipe([0], generator=[seeded(), seeded()])
        with pytest.raises(ValueError, match="num_inference_steps must be at least 1 and at most 100000, not 0"):
            pipe([0], num_inference_steps=0)
        with pytest.raises(ValueError, match="num_images_per_prompt must be at least 1"):
            pipe([0], num_images_per_prompt=0)
        with pytest.raises(
            ValueError,
            match=r"callback_on_step_end_tensor_inputs must be in \['latents', 'model_input', 'prediction'\]",
        ):
            pipe([0], callback_on_step_end_tensor_inputs=["noise"])
        with pytest.raises(ValueError, match=r"`latents` has shape \(1, 3, 4, 4\); \(1, 3, 8, 8\) is needed"):
            pipe([0], latents=torch.zeros(1, 3, 4, 4))


def test_sampling_settings_are_saved_and_used(make_pipe, tmp_path):
    make_pipe(guidance_scale=1.5, num_inference_steps=3).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    settings = []

    def record(pipe, step, timestep, tensors):
        settings.append((pipe.guidance_scale, pipe.num_timesteps))

    def images(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return pipe([1], generator=generator, output_type="np", callback_on_step_end=record, **kwargs).images

    assert pipe.guidance_scale == 1.5  # before the first call
    own = images()
    assert settings == [(1.5, 3)] * 3
    assert np.array_equal(own, images(guidance_scale=1.5, num_inference_steps=3))
    settings.clear()
    images(guidance_scale=1.0, num_inference_steps=2)
    assert settings == [(1.0, 2)] * 2
    assert pipe.sampling_settings() == {"guidance_scale": 1.5, "num_inference_steps": 3}
