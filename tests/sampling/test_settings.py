import json
from dataclasses import dataclass

import pytest
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler

from sdt_diffusion.sampling.settings import (
    PipelineArguments,
    SamplerArguments,
    SamplingArguments,
    load_pipeline,
    parse_classes,
)
from sdt_diffusion.utils.arguments import parse_arguments


def test_settings_are_those_given_else_those_saved_else_the_defaults(make_pipe):
    plain, saved = make_pipe(), make_pipe(guidance_scale=1.5, num_inference_steps=25)
    assert SamplerArguments().settings(plain) == {"guidance_scale": 4.0, "num_inference_steps": 50}
    assert SamplerArguments().settings(saved) == {"guidance_scale": 1.5, "num_inference_steps": 25}
    given = SamplerArguments(guidance_scale=0.0, num_inference_steps=3)
    assert given.settings(saved) == {"guidance_scale": 0.0, "num_inference_steps": 3}
    arguments = PipelineArguments(model="-", seed=7)
    assert arguments.settings(saved) == {"seed": 7, "guidance_scale": 1.5, "num_inference_steps": 25}


def test_defaults_are_written_out_for_a_new_pipeline():
    filled = SamplerArguments(num_inference_steps=25).with_defaults()
    assert filled == SamplerArguments(num_inference_steps=25, guidance_scale=4.0)


def test_a_command_line_names_all_settings():
    flags = "--model m --scheduler X --num_inference_steps 3 --guidance_scale 1 --attention_backend dense --seed 2"
    (args,) = parse_arguments((SamplingArguments,), [*flags.split(), "--batch_size", "4", "--dtype", "bfloat16"])
    assert args == SamplingArguments(
        model="m",
        scheduler="X",
        num_inference_steps=3,
        guidance_scale=1.0,
        attention_backend="dense",
        seed=2,
        batch_size=4,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(("name", "value"), [("num_inference_steps", 0), ("seed", -1), ("batch_size", 0)])
def test_values_that_are_too_small_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be at least \d.*, not {value}"):
        SamplingArguments(model="m", **{name: value})


def test_a_pipeline_is_loaded_with_scheduler_and_backend(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path)
    arguments = {"scheduler": "FlowMatchHeunDiscreteScheduler", "attention_backend": "dense", "dtype": "bfloat16"}
    pipe = load_pipeline(PipelineArguments(model=str(tmp_path), **arguments), "cpu")
    assert isinstance(pipe.scheduler, FlowMatchHeunDiscreteScheduler)
    assert {processor.backend for processor in pipe.transformer.attn_processors.values()} == {"dense"}
    assert str(pipe.dtype) == "torch.bfloat16"
    diffusers_backend = load_pipeline(PipelineArguments(model=str(tmp_path), attention_backend="native"), "cpu")
    processors = diffusers_backend.transformer.attn_processors.values()
    assert {processor._attention_backend for processor in processors} == {"native"}
    pruned = load_pipeline(PipelineArguments(model=str(tmp_path), attention_prune_eps=1e-3), "cpu")
    assert {processor.prune_eps for processor in pruned.transformer.attn_processors.values()} == {1e-3}


def test_manifests_name_what_was_chosen_for_attention():
    assert SamplerArguments().attention_record() == {}
    chosen = {"attention_backend": "blockwise", "attention_prune_eps": 1e-3}
    assert SamplerArguments(**chosen).attention_record() == chosen


def test_models_that_cannot_be_loaded_are_named(make_pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model: \./no holds no pipeline"):
        load_pipeline(PipelineArguments(model="./no"), "cpu")
    with pytest.raises(FileNotFoundError, match=r"holds no pipeline"):
        load_pipeline(PipelineArguments(model=str(tmp_path)), "cpu")
    make_pipe().save_pretrained(tmp_path)
    for arguments, message in [
        ({"scheduler": "DDIMScheduler"}, "'DDIMScheduler' is not a scheduler for this flow-matching model"),
        (
            {"attention_backend": "fast"},
            "attention_backend 'fast' cannot be used. Unknown .*blockwise, triton.*, or of diffusers' .*native",
        ),
        ({"attention_backend": "native", "attention_prune_eps": 0.1}, "must be 0 with the attention_backend native"),
        (
            {"attention_backend": "dense", "attention_prune_eps": 0.1},
            "'dense' skips no tokens: choose one of blockwise",
        ),
        (
            {"guidance_interval": [0.991, 0.992], "num_inference_steps": 50},
            r"guidance_interval \(0.991, 0.992\) holds none of the 50 steps",
        ),
        ({"model": str(tmp_path / "model_index.json")}, "is a file, .* by sdt-diffusion convert"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_pipeline(PipelineArguments(**{"model": str(tmp_path), **arguments}), "cpu")
    for device in ("gpu9", "meta:x"):
        with pytest.raises(ValueError, match=f"device {device} cannot be used"):
            load_pipeline(PipelineArguments(model=str(tmp_path)), device)
    weights = next((tmp_path / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises((ValueError, OSError)):
        load_pipeline(PipelineArguments(model=str(tmp_path)), "cpu")


def test_a_word_is_a_class_where_it_names_one_and_else_an_id(make_pipe):
    pipe = make_pipe()
    assert parse_classes(pipe, ["3", "bee", "honey bee", "0"]) == [3, 1, 1, 0]
    numbered = make_pipe(id2label={0: "4", 1: "3"})
    assert parse_classes(numbered, ["4", "3", "2"]) == [0, 1, 2]
    for words, message in [
        (["-1"], "Class label -1 is out of range"),
        (["5"], "Class label 5 is out of range"),
        (["wasp"], "Unknown class name"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_classes(pipe, words)


def test_pipelines_saved_before_there_were_settings_load_unchanged(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["guidance_scale"], index["num_inference_steps"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert pipe.sampling_settings() == {"guidance_scale": 4.0, "num_inference_steps": 50}


def test_a_script_may_make_the_model_optional():
    @dataclass(kw_only=True)
    class Optional(SamplingArguments):
        model: str | None = None

    assert parse_arguments((Optional,), [])[0].model is None
