"""The command line's guidance, and what is recorded of it."""

import json

import diffusers
import pytest
from diffusers.guiders import ClassifierFreeGuidance

from sdt_diffusion import SDTGuidance
from sdt_diffusion.sampling.folder import sample_into
from sdt_diffusion.sampling.generate import describe_sampling
from sdt_diffusion.sampling.sample import main
from sdt_diffusion.sampling.settings import PipelineArguments, SamplerArguments, load_pipeline
from sdt_diffusion.utils.arguments import parse_arguments


def applied(pipe, flags=""):
    """Return the pipeline after the flags of a command line."""
    (arguments,) = parse_arguments((SamplerArguments,), flags.split())
    arguments.apply_to(pipe)
    return pipe


def test_flags_make_a_guider(make_pipe):
    pipe = make_pipe(guidance_scale=1.5)
    assert applied(pipe).guider is None
    for flags, words, scale in (
        ("--guidance cfg", "", 1.5),
        ("--guidance cfg_3channels --guidance_scale 3", "of 3 channels", 3),
        ("--guidance_interval 0.2 0.8", "at sigma 0.2 to 0.8", 1.5),
        (
            "--guidance decay --guidance_interval 200 800 --guidance_interval_unit timestep",
            "decay times 4, at timestep 200 to 800",
            1.5,
        ),
        ("--guidance decay --decay_guidance_factor 8 --guidance_rescale 0.5", "decay times 8, rescaled 0.5", 1.5),
        ("--guidance apg", "projected (parallel_weight 0, momentum -0.5, norm_threshold 0)", 1.5),
    ):
        guider = applied(make_pipe(guidance_scale=1.5), flags).guider
        assert (guider.describe(), guider.guidance_scale) == (words, scale)


def test_flags_change_a_saved_guider_or_replace_it(make_pipe, make_model):
    saved = SDTGuidance.from_kind("decay", guidance_scale=2, decay_factor=3)
    pipe = applied(make_pipe(guider=saved), "--guidance_interval 0.2 0.8 --decay_guidance_factor 5")
    assert (pipe.guider.describe(), pipe.guider.guidance_scale) == ("decay times 5, at sigma 0.2 to 0.8", 2)
    assert saved.describe() == "decay times 3"
    auto = make_pipe(guider=SDTGuidance.from_kind("autoguidance"), guide_transformer=make_model(num_layers=1))
    assert applied(auto, "--guidance_rescale 0.5").guide_transformer is not None
    assert applied(auto, "--guidance cfg").guide_transformer is None


def test_autoguidance_takes_the_model_of_another_folder(make_pipe, make_model, tmp_path):
    make_pipe(transformer=make_model(num_layers=1)).save_pretrained(tmp_path / "weak")
    make_pipe().save_pretrained(tmp_path / "model")
    flags = {"guidance": "autoguidance", "guide_model": str(tmp_path / "weak"), "guidance_scale": 2.0}
    pipe = load_pipeline(PipelineArguments(model=str(tmp_path / "model"), **flags, attention_backend="dense"), "cpu")
    assert pipe.guide_transformer.config.num_layers == 1
    processors = pipe.guide_transformer.attn_processors.values()
    assert {processor.backend for processor in processors} == {"dense"}
    pipe.set_progress_bar_config(disable=True)
    pipe([0], num_inference_steps=1)


def test_flags_that_contradict_each_other_or_the_model_are_refused(make_pipe, make_model, tmp_path, tiny_vae):
    flow, names = diffusers.FlowMatchEulerDiscreteScheduler, {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
    make_pipe().save_pretrained(tmp_path / "same")
    make_pipe(diffusers.DDIMScheduler()).save_pretrained(tmp_path / "epsilon")
    make_pipe(id2label=names).save_pretrained(tmp_path / "names")
    make_pipe(transformer=make_model(num_classes=4)).save_pretrained(tmp_path / "classes")
    make_pipe(transformer=make_model(in_channels=4), vae=tiny_vae).save_pretrained(tmp_path / "latents")
    auto = "--guidance autoguidance"
    for flags, message in (
        ("--guidance_interval 0.2", "guidance_interval must be two numbers"),
        ("--guidance_interval 0.8 0.2", "the lower one first"),
        ("--guidance_interval_unit timestep", "guidance_interval, which is not given"),
        ("--decay_guidance_factor 2", "decay_guidance_factor is for guidance decay, not for cfg"),
        ("--guidance apg --decay_guidance_factor 2", "decay_guidance_factor is for guidance decay, not for apg"),
        (
            f"--guidance decay --guide_model {tmp_path / 'same'}",
            "guide_model is for guidance autoguidance, not for dec",
        ),
        (f"--guide_model {tmp_path / 'same'}", "guide_model is for guidance autoguidance, not for cfg"),
        (auto, "guidance autoguidance needs a guide_model, the pipeline of a weaker model"),
        (f"{auto} --guide_model {tmp_path / 'none'}", "guide_model: .* cannot be loaded"),
        (f"{auto} --guide_model {tmp_path / 'epsilon'}", "predicts something else, or at other noise levels"),
        (f"{auto} --guide_model {tmp_path / 'names'}", "has other classes or another VAE"),
        (f"{auto} --guide_model {tmp_path / 'latents'}", "has other classes or another VAE"),
    ):
        with pytest.raises(ValueError, match=message):
            applied(make_pipe(flow()), flags)
    for flags, message in (
        (f"{auto} --guide_model {tmp_path / 'classes'}", "guide_transformer has num_classes 4"),
        ("--guidance_interval 0.2 1.6", "lies outside the schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplerArguments().settings(applied(make_pipe(flow()), flags))
    with pytest.raises(ValueError, match="options cannot be added to the pipeline's ClassifierFreeGuidance"):
        applied(make_pipe(guider=ClassifierFreeGuidance()), "--guidance_rescale 0.5")


def test_guidance_is_recorded_with_the_samples_and_another_one_is_refused(make_pipe, make_model, tmp_path):
    sampling = {"seed": 0, "guidance_scale": 2.0, "num_inference_steps": 2}
    guider = SDTGuidance.from_kind("autoguidance", guidance_interval=(0.5, 1.0))
    pipe = make_pipe(guider=guider, guide_transformer=make_model(num_layers=1))
    samples = sample_into(tmp_path / "samples", pipe, [0, 1], sampling, 2, progress=False)
    assert samples.manifest["guider"]["guidance_interval"] == [0.5, 1.0]
    text = "guidance 2 (autoguidance, at sigma 0.5 to 1)"
    assert text in samples.manifest["sampler"]
    assert "3 network evaluations" in samples.manifest["sampler"]
    for other in (
        make_pipe(guider=guider.new(guidance_interval=None), guide_transformer=pipe.guide_transformer),
        make_pipe(guider=guider, guide_transformer=make_model(num_layers=1, num_attention_heads=1)),
        make_pipe(),
    ):
        with pytest.raises(ValueError, match="made with other settings"):
            sample_into(tmp_path / "samples", other, [0, 1], sampling, 2, progress=False)
    assert describe_sampling(make_pipe(), sampling).endswith("guidance 2, seed 0")


def test_sample_and_its_record(make_pipe, tmp_path):
    make_pipe(guidance_scale=1.5, num_inference_steps=2).save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--num_images", "2", "--output_dir", str(tmp_path / "images")]
    main([*flags, "--guidance", "decay", "--decay_guidance_factor", "3"])
    record = json.loads((tmp_path / "images" / "samples.json").read_text())
    assert record["guider"]["decay_factor"] == 3
    assert record["sampler"].endswith("4 network evaluations, guidance 1.5 (decay times 3), seed 0")
    with pytest.raises(SystemExit, match=r"it holds other samples \(guider"):
        main([*flags, "--guidance", "decay", "--decay_guidance_factor", "4"])


@pytest.mark.parametrize("damage", ['{"guidance_scale": NaN}', '{"guidance_interval": [2, 1]}', "{", "[]", '{"a": 1'])
def test_a_damaged_guider_is_refused(make_pipe, tmp_path, damage):
    make_pipe(guider=SDTGuidance()).save_pretrained(tmp_path)
    (tmp_path / "guider" / "guider_config.json").write_text(damage)
    with pytest.raises(ValueError, match=r"model: .* cannot be loaded"):
        load_pipeline(PipelineArguments(model=str(tmp_path)), "cpu")
