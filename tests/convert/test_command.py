"""Test the command `sdt-diffusion convert`, and what it refuses."""

import argparse
import inspect
import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from sdt_diffusion import commands
from sdt_diffusion.convert.__main__ import ConvertArguments, main, with_flags
from sdt_diffusion.convert.assemble import read_source
from sdt_diffusion.utils.arguments import parse_arguments
from tests.convert.references import random_reference
from tests.convert.test_convert import EQUAL, difference
from tests.scripts.process import ROOT

HEADS = ("--num_attention_heads", "4")


@pytest.fixture(scope="module")
def reference():
    return random_reference(32, 2, 4)


@pytest.fixture
def checkpoint(reference, tmp_path):
    torch.save(reference.state_dict(), tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command that must end with one line and write nothing."""

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        error = str(end.value.code) if isinstance(end.value.code, str) else capsys.readouterr().err
        assert end.value.code not in (0, None)
        assert len(error.strip().splitlines()) == 1, error
        assert not (tmp_path / "out").exists()
        return error

    return run


class TestWhatItWrites:
    def test_a_folder_that_diffusers_loads(self, reference, checkpoint, tmp_path, capsys):
        main([str(checkpoint), str(tmp_path / "out"), "--kind", "dit", *HEADS])
        assert capsys.readouterr().out.startswith("DiT: 2 blocks of width 32, 4 heads, ")
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
        assert difference(reference, pipe) < EQUAL
        assert pipe.transformer.config.decay_start == "none"

    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
    def test_training_checkpoints_give_their_averaged_weights(self, reference, tmp_path, prefix):
        averaged = {prefix + name: value for name, value in reference.state_dict().items()}
        trained = {name: value + 1 for name, value in averaged.items()}
        checkpoint = {"model": trained, "ema": averaged, "opt": {"lr": 1e-4}, "args": argparse.Namespace(seed=0)}
        torch.save(checkpoint, tmp_path / "0050000.pt")
        source = read_source(tmp_path / "0050000.pt", "dit", 4)
        assert torch.equal(source.weights["proj_out_2.bias"], reference.final_layer.linear.bias)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_weights_of_other_precision_become_fp32(self, reference, tmp_path, dtype):
        save_file(
            {name: value.to(dtype) for name, value in reference.state_dict().items()}, tmp_path / "dit.safetensors"
        )
        source = read_source(tmp_path / "dit.safetensors", "dit", 4)
        assert {value.dtype for value in source.weights.values()} == {torch.float32}

    @pytest.mark.parametrize("names", [[f"class {i}" for i in range(10)], {str(i): f"class {i}" for i in range(10)}])
    def test_class_names_and_a_vae_are_part_of_the_pipeline(self, checkpoint, tiny_vae, tmp_path, names):
        (tmp_path / "names.json").write_text(json.dumps(names))
        tiny_vae.save_pretrained(tmp_path / "vae")
        parts = ("--vae", str(tmp_path / "vae"), "--class_names", str(tmp_path / "names.json"))
        main([str(checkpoint), str(tmp_path / "out"), "--kind", "dit", *HEADS, *parts])
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
        assert pipe.id2label == {i: f"class {i}" for i in range(10)}
        assert torch.equal(pipe.vae.decoder.conv_out.weight, tiny_vae.decoder.conv_out.weight)

    def test_statistics_of_latents_become_those_of_the_vae(self, tiny_vae, tmp_path):
        lightning = random_reference(32, 1, 4, options=("swiglu",), learn_sigma=False)
        torch.save(lightning.state_dict(), tmp_path / "lightning.pt")
        mean, std = torch.arange(4.0).view(1, 4, 1, 1), torch.tensor([0.5, 1, 2, 4]).view(1, 4, 1, 1)
        torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
        tiny_vae.save_pretrained(tmp_path / "vae")
        stats = ("--vae", str(tmp_path / "vae"), "--latent_stats", str(tmp_path / "latents_stats.pt"))
        main([str(tmp_path / "lightning.pt"), str(tmp_path / "out"), *HEADS, *stats])
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
        call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "return_dict": False}
        latents = pipe([3], output_type="latent", **call)[0]
        call["generator"].manual_seed(0)
        expected = (pipe.vae.decode(latents * std + mean).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(pipe([3], output_type="pt", **call)[0], expected)

    @pytest.mark.parametrize("name", ["back.pt", "back.safetensors"])
    def test_a_file_in_the_layout_it_came_from(self, reference, checkpoint, tmp_path, name):
        main([str(checkpoint), str(tmp_path / "out"), "--kind", "dit", *HEADS, "--spatial_decay", "none"])
        back = tmp_path / name
        main([str(tmp_path / "out"), str(back), "--to", "dit"])
        found = load_file(back) if name.endswith("safetensors") else torch.load(back, weights_only=True)
        assert found.keys() == reference.state_dict().keys()
        for key, expected in reference.state_dict().items():
            torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-6)


class TestBadInput:
    def test_dit_and_sit_look_the_same(self, refused, checkpoint, tmp_path):
        assert "give kind dit (predicts noise) or sit" in refused(checkpoint, tmp_path / "out")

    def test_heads_of_unknown_widths(self, refused, checkpoint, tmp_path):
        words = (checkpoint, tmp_path / "out", "--kind", "dit")
        assert "heads of width 32: give num_attention_heads" in refused(*words)
        assert "num_attention_heads 5 does not divide the width 32" in refused(*words, "--num_attention_heads", 5)
        assert "num_attention_heads must be at least 1" in refused(*words, "--num_attention_heads", 0)

    def test_pickled_code_is_not_run_and_the_error_says_what_to_do(self, refused, reference, tmp_path):
        torch.save({"ema": reference}, tmp_path / "code.pt")
        error = refused(tmp_path / "code.pt", tmp_path / "out", "--kind", "dit", *HEADS)
        assert "code.pt cannot be read: it holds pickled code, which is not run" in error
        assert "torch.load(path, weights_only=False)" in error

    @pytest.mark.parametrize("size", [0, 10, 10_000])
    @pytest.mark.parametrize("save", [torch.save, save_file])
    def test_truncated_files(self, refused, reference, tmp_path, size, save):
        path = tmp_path / ("dit.pt" if save is torch.save else "dit.safetensors")
        save(reference.state_dict(), path)
        path.write_bytes(path.read_bytes()[:size])
        assert f"{path}" in refused(path, tmp_path / "out", "--kind", "dit", *HEADS)

    def test_names_that_are_missing_or_left_over_are_listed(self, refused, reference, tmp_path):
        state = reference.state_dict()
        for i in range(20):
            state[f"extra.{i:02}"] = torch.zeros(1)
        del state["blocks.1.mlp.fc1.bias"]
        torch.save(state, tmp_path / "odd.pt")
        error = refused(tmp_path / "odd.pt", tmp_path / "out", "--kind", "dit", *HEADS)
        assert "not a checkpoint of DiT: it lacks blocks.1.mlp.fc1.bias and it has extra.00, extra.01" in error
        assert "and 15 more" in error

    def test_other_architectures(self, refused, tmp_path):
        torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
        for kind in ("dit", "sit", "lightningdit"):
            error = refused(tmp_path / "linear.pt", tmp_path / "out", "--kind", kind)
            assert "not a checkpoint of" in error
            assert "it has bias, weight" in error
        lightning = random_reference(32, 1, 4, options=("swiglu",))
        torch.save(lightning.state_dict(), tmp_path / "lightning.pt")
        assert "not a checkpoint of SiT: it lacks" in refused(
            tmp_path / "lightning.pt", tmp_path / "out", "--kind", "sit"
        )

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("pos_embed", lambda x: x + 1),
            ("pos_embed", lambda x: x[:, :15]),
            ("x_embedder.proj.weight", lambda x: x[0]),
            ("x_embedder.proj.weight", lambda x: x[:, :, :, :1]),
            ("x_embedder.proj.bias", lambda x: x[:1]),
            ("blocks.0.attn.qkv.weight", lambda x: x[:-1]),
            ("blocks.1.attn.qkv.bias", lambda x: x[0]),
            ("blocks.0.mlp.fc2.weight", lambda x: x[:, :0]),
            ("blocks.1.adaLN_modulation.1.weight", lambda x: x[:1]),
            ("final_layer.linear.weight", lambda x: x[:-1]),
            ("final_layer.linear.bias", lambda x: x[:-1]),
            ("t_embedder.mlp.0.weight", lambda x: x[:, :-1]),
            ("y_embedder.embedding_table.weight", lambda x: x[:1]),
            ("y_embedder.embedding_table.weight", lambda x: x.long()),
            ("t_embedder.mlp.0.weight", lambda x: x.fill_(torch.nan)),
        ],
    )
    @pytest.mark.parametrize("kind", ["dit", "sit"])
    def test_tensors_of_other_shapes_or_values(self, refused, reference, tmp_path, name, change, kind):
        state = {key: value.clone() for key, value in reference.state_dict().items()}
        state[name] = change(state[name])
        torch.save(state, tmp_path / "odd.pt")
        # By the name that it has there.
        assert name.rpartition(".")[0] in refused(tmp_path / "odd.pt", tmp_path / "out", "--kind", kind, *HEADS)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("feat_rope.freqs_cos", lambda x: x + 1),
            ("feat_rope.freqs_sin", lambda x: x[:1]),
            ("blocks.0.norm1.weight", lambda x: x[:3]),
            ("blocks.1.norm2.weight", lambda x: x[0]),
            ("blocks.0.attn.q_norm.weight", lambda x: x[:3]),
            ("blocks.1.attn.k_norm.weight", lambda x: x[:4]),
            ("blocks.0.mlp.w12.weight", lambda x: x[:1]),
            ("blocks.1.mlp.w3.weight", lambda x: x[0]),
            ("final_layer.norm_final.weight", lambda x: x[:0]),
        ],
    )
    def test_tensors_of_other_shapes_in_lightning_dit(self, refused, tmp_path, name, change):
        state = random_reference(32, 2, 4, options=("rotary", "swiglu", "rms", "qk_norm")).state_dict()
        torch.save({**state, name: change(state[name])}, tmp_path / "odd.pt")
        assert name in refused(tmp_path / "odd.pt", tmp_path / "out")

    def test_heads_that_the_tensors_contradict(self, refused, tmp_path):
        torch.save(random_reference(32, 1, 4, options=("rotary",)).state_dict(), tmp_path / "lightning.pt")
        error = refused(tmp_path / "lightning.pt", tmp_path / "out", "--num_attention_heads", 2)
        assert "freqs_cos has 8 channels, which do not fit num_attention_heads 2" in error

    def test_parts_that_do_not_fit_the_model(self, refused, checkpoint, tiny_vae, tiny_rae, tmp_path):
        words = (checkpoint, tmp_path / "out", "--kind", "dit", *HEADS)
        for content in ('["a", "b"]', '{"0": 1}', '{"a": "b"}', "[", "3", '{"0": ["a"]}'):
            (tmp_path / "names.json").write_text(content)
            refused(*words, "--class_names", tmp_path / "names.json")
        tiny_vae.save_pretrained(tmp_path / "whole")
        stats, vae = ("--latent_stats", tmp_path / "stats.pt"), ("--vae", tmp_path / "whole")
        for content in ({"mean": torch.ones(4)}, {"mean": torch.ones(4), "std": torch.zeros(4)}, [1], {"mean": main}):
            torch.save(content, tmp_path / "stats.pt")
            assert "stats.pt" in refused(*words, *vae, *stats)
        torch.save({"mean": torch.ones(3), "std": torch.ones(3)}, tmp_path / "stats.pt")
        assert "latent_stats are of 3 channels, and the VAE has 4" in refused(*words, *vae, *stats)
        assert "give vae too" in refused(*words, *stats)
        tiny_rae.save_pretrained(tmp_path / "rae")
        assert "The VAE has 64 latent channels, and the model" in refused(*words, "--vae", tmp_path / "rae")
        tiny_vae.register_to_config(latent_channels=16)
        tiny_vae.save_config(tmp_path / "vae")
        refused(*words, "--vae", tmp_path / "vae")
        refused(*words, "--vae", tmp_path / "none")
        refused(*words, "--numerics", "diffusers")
        assert "spatial_decay" in refused(*words, "--spatial_decay", "fixed")

    def test_places(self, refused, checkpoint, tmp_path):
        assert "There is no file" in refused(tmp_path / "none.pt", tmp_path / "out")
        assert "holds no model of diffusers (no config.json)" in refused(tmp_path, tmp_path / "out")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        for place in (tmp_path / "full", tmp_path / "full" / "file"):
            assert "exists already" in refused(tmp_path / "none.pt", place, "--kind", "dit")  # before it is read
        assert "required: --destination" in refused(checkpoint)
        assert "must end in .pt or .safetensors" in refused(tmp_path, tmp_path / "out", "--to", "dit")


def test_the_commands_of_the_documentation_and_of_the_help_parse():
    text = (ROOT / "docs" / "converting.md").read_text() + inspect.getdoc(inspect.getmodule(main))
    commands_shown = re.findall(r"^ *sdt-diffusion convert (.*?)(?: +#.*)?$", text, re.MULTILINE)
    assert len(commands_shown) == 12
    for words in commands_shown:
        (args,) = parse_arguments((ConvertArguments,), with_flags(words.split()))
        assert args.source
        assert args.destination


def test_the_first_two_words_are_source_and_destination():
    assert with_flags(["a", "b", "--kind", "dit"]) == ["--source", "a", "--destination", "b", "--kind", "dit"]
    assert with_flags(["--source", "a"]) == ["--source", "a"]
    assert with_flags(["a", "--kind", "dit"]) == ["--source", "a", "--kind", "dit"]
    assert with_flags([]) == []


class TestUmbrella:
    def test_it_runs_a_command(self, checkpoint, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "sys.argv", ["sdt-diffusion", "convert", str(checkpoint), str(tmp_path / "out"), "--kind", "dit", *HEADS]
        )
        commands.main()
        assert (tmp_path / "out" / "model_index.json").is_file()

    def test_it_lists_its_commands(self, capsys):
        with pytest.raises(SystemExit) as end:
            commands.main(["--help"])
        assert end.value.code == 0
        assert "convert" in capsys.readouterr().out

    def test_it_suggests_a_command(self):
        with pytest.raises(SystemExit, match=r"unknown command covert \(did you mean convert\?\)"):
            commands.main(["covert"])
        with pytest.raises(SystemExit, match="usage: sdt-diffusion COMMAND"):
            commands.main([])
