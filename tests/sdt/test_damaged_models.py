"""Folders of models that were damaged, exchanged or prepared, and numbers that nobody means."""

import json
import math
import os

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from sdt_diffusion import SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.sdt.loading import open_pipeline, open_transformer
from sdt_diffusion.sdt.schedulers import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS
from sdt_diffusion.utils.reading import CHECKSUMS_FILE

from ..conftest import TINY

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_tensors(folder, change):
    """Write other tensors without a checksum that would give them away."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS)
    (folder / CHECKSUMS_FILE).unlink()


def without_one(tensors):
    return dict(list(tensors.items())[1:])


def renamed(tensors):
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def with_nan(tensors):
    return {name: torch.full_like(tensor, math.nan) for name, tensor in tensors.items()}


def as_int8(tensors):
    return {name: tensor.to(torch.int8) for name, tensor in tensors.items()}


class TestTransformer:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (without_one, "is not a whole SDTTransformer2DModel: it has no .*"),
            (renamed, "and 42 more and has unknown .*"),
        ],
    )
    def test_weights_that_are_missing_are_not_made_up(self, folder, change, message):
        change_tensors(folder, change)
        for how in ({}, {"dtype": torch.bfloat16}, {"low_cpu_mem_usage": True}):
            with pytest.raises(ValueError, match=message):
                SDTTransformer2DModel.from_pretrained(folder, **how)
        _, info = SDTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
        assert info["missing_keys"]

    def test_weights_without_a_place_are_not_left_out(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_layers": 1}))
        with pytest.raises(ValueError, match=r"it has unknown transformer_blocks\.1.* and 13 more\."):
            SDTTransformer2DModel.from_pretrained(folder)

    def test_one_flipped_bit_is_noticed(self, folder):
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[-5] ^= 1
        (folder / WEIGHTS).write_bytes(content)
        for where in ((folder, {}), (folder.parent, {"subfolder": "model"})):
            with pytest.raises(ValueError, match=r"is damaged: its SHA-256 .* on purpose, delete .*checksums\.json"):
                SDTTransformer2DModel.from_pretrained(where[0], **where[1])
        (folder / CHECKSUMS_FILE).unlink()
        SDTTransformer2DModel.from_pretrained(folder)

    @pytest.mark.parametrize("how", [{"max_shard_size": "30KB"}, {"variant": "fp16"}, {}])
    def test_saving_again_keeps_the_checksums_true(self, folder, make_model, how):
        other = make_model(num_classes=7)
        other.save_pretrained(folder, **how)
        loaded = SDTTransformer2DModel.from_pretrained(folder, variant=how.get("variant"))
        assert torch.equal(loaded.time_class_embed.class_embedder.weight, other.time_class_embed.class_embedder.weight)
        assert set(json.loads((folder / CHECKSUMS_FILE).read_text())) == {p.name for p in folder.glob("*.safetensors")}

    @pytest.mark.parametrize(("change", "message"), [(with_nan, "NaN or infinite"), (as_int8, "is of type I8")])
    def test_weights_that_no_training_leaves_are_refused_by_scripts(self, folder, change, message):
        change_tensors(folder, change)
        with pytest.raises(ValueError, match=message):
            open_transformer(str(folder))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("num_layers", value) for value in (0, -1, 10**9, "two", math.nan, None)),
            *(("class_dropout_prob", value) for value in (2, -0.1, math.nan)),
            *(("patch_size", value) for value in (0, -2, 2.5)),
            *(("num_classes", value) for value in (0, 10**9, True)),
            *(("sample_size", value) for value in (0, "8", [8], [8, 10**9])),
            *(("decay_initial_value", value) for value in (math.nan, math.inf, 1e30, "x")),
            *(("decay_heads_range", value) for value in (math.nan, -1e30)),
            *(("mlp_ratio", value) for value in (0, -1, math.inf, 1e30)),
            *(("dropout", 1), ("norm_eps", -1), ("norm_eps", math.nan), ("in_channels", 0), ("out_channels", 0)),
            *(
                ("attention_head_dim", 0),
                ("rotary", "yes"),
                ("frequency_embedding_size", -1),
                ("num_attention_heads", 0),
            ),
        ],
    )
    def test_numbers_that_nobody_means_are_refused(self, name, value):
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            SDTTransformer2DModel(**{**TINY, name: value})

    def test_a_model_beyond_any_memory_is_refused(self):
        with pytest.raises(ValueError, match=r"^The number of parameters"):
            SDTTransformer2DModel(num_layers=1000, num_attention_heads=1000, attention_head_dim=100)


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def config_of(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


class TestPipeline:
    @pytest.fixture
    def folder(self, make_pipe, make_model, tiny_vae, tmp_path):
        make_pipe(transformer=make_model(in_channels=4), vae=tiny_vae).save_pretrained(tmp_path / "pipe")
        return tmp_path / "pipe"

    def test_a_whole_one_loads(self, folder):
        assert isinstance(open_pipeline(str(folder)), SDTPipeline)
        for part in ("transformer", "vae"):
            assert (folder / part / CHECKSUMS_FILE).is_file()

    def test_a_changed_vae_is_noticed(self, folder):
        content = bytearray((folder / "vae" / WEIGHTS).read_bytes())
        content[-5] ^= 1
        (folder / "vae" / WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged: its SHA-256"):
            SDTPipeline.from_pretrained(folder)

    @pytest.mark.parametrize("load", [SDTPipeline.from_pretrained, DiffusionPipeline.from_pretrained, open_pipeline])
    def test_missing_weights_of_a_vae_are_not_made_up(self, folder, load):
        change_tensors(folder / "vae", without_one)
        with pytest.raises(ValueError, match=r"The vae is not whole: its files have no \w+\.conv_in\.bias"):
            load(str(folder))

    @pytest.mark.parametrize("part", ["transformer", "vae"])
    def test_nan_in_a_part_is_refused(self, folder, part):
        change_tensors(folder / part, with_nan)
        with pytest.raises(ValueError, match=f"The {part} of .* cannot be used: .* NaN or infinite"):
            open_pipeline(str(folder))

    @pytest.mark.parametrize(
        "changes",
        [
            {"transformer": ["diffusers", "AutoencoderKL"]},
            {"transformer": ["sdt", 5]},
            {"transformer": "sdt"},
            {"transformer": [None, None]},
            {"scheduler": ["diffusers", "AutoencoderKL"]},
            {"scheduler": [None, None]},
            {"vae": ["sdt", "SDTTransformer2DModel"]},
            {"_class_name": "DiTPipeline"},
            {"_class_name": 5},
            {"_class_name": ["a", "b"]},
            {"id2label": ["ant"]},
            {"id2label": {"0": 5}},
            {"id2label": {"ant": "0"}},
            {"guidance_scale": "much"},
            {"num_inference_steps": 0},
            {"num_inference_steps": 1e8},
        ],
    )
    def test_an_odd_index_is_refused(self, folder, changes):
        rewrite(folder / "model_index.json", **changes)
        with pytest.raises(ValueError, match=r"pipe (cannot be loaded: .+|is not whole)"):
            open_pipeline(str(folder))

    def test_a_named_pipe_is_not_waited_for(self, folder):
        for name in (f"transformer/{WEIGHTS}", f"transformer/{CHECKSUMS_FILE}", "model_index.json"):
            (folder / name).unlink()
            os.mkfifo(folder / name)
            with pytest.raises(ValueError, match="cannot be loaded"):
                open_pipeline(str(folder))

    def test_a_config_of_another_model_is_refused(self, folder):
        dit = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=1, sample_size=8
        )
        dit.save_pretrained(folder / "transformer")
        with pytest.raises(ValueError, match="cannot be loaded"):
            open_pipeline(str(folder))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("num_train_timesteps", value) for value in (0, -1, 10**12, "many", math.nan, None)),
            *(("shift", value) for value in (0, -1, math.nan, 1e30)),
            *(("stochastic_sampling", "yes"), ("use_dynamic_shifting", 1)),
            *(("shift_terminal", ["a"]), ("shift_terminal", {}), ("shift_terminal", "a")),
            *(("prediction_type", "nonsense"), ("beta_end", math.nan), ("beta_start", -1)),
        ],
    )
    def test_a_damaged_scheduler_is_refused_before_it_asks_for_memory(self, folder, name, value):
        rewrite(folder / "scheduler" / "scheduler_config.json", **{name: value})
        with pytest.raises(ValueError, match=f"cannot be loaded: The scheduler's {name} must be "):
            open_pipeline(str(folder))

    @pytest.mark.parametrize("scheduler", [*DIFFUSION_SCHEDULERS, *FLOW_SCHEDULERS])
    def test_every_scheduler_can_be_saved_and_opened(self, make_pipe, tmp_path, scheduler):
        saved = getattr(diffusers, scheduler)()
        make_pipe(saved).save_pretrained(tmp_path / "any")
        opened = open_pipeline(str(tmp_path / "any")).scheduler
        assert type(opened) is type(saved)
        assert config_of(opened) == config_of(saved)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000, bytes(range(256)), b'"x"'])
    @pytest.mark.parametrize(
        "name", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"]
    )
    def test_files_that_are_no_configs_are_named(self, folder, name, content):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"pipe cannot be loaded: .+"):
            open_pipeline(str(folder))

    def test_parts_of_another_kind_are_refused(self, make_model):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ValueError, match="transformer must be an SDTTransformer2DModel, not a Linear"):
            SDTPipeline(torch.nn.Linear(1, 1), scheduler)
        with pytest.raises(ValueError, match="scheduler must be a scheduler of diffusers, not a Linear"):
            SDTPipeline(make_model(), torch.nn.Linear(1, 1))
        with pytest.raises(ValueError, match="vae must be a VAE of diffusers, not a Linear"):
            SDTPipeline(make_model(), scheduler, torch.nn.Linear(1, 1))


class TestCalls:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("guidance_scale", value) for value in (math.nan, math.inf, -1e30, 1e30, "4")),
            *(("num_inference_steps", value) for value in (0, -1, 10**8, 2.5, math.nan)),
            *(("num_images_per_prompt", value) for value in (0, 10**9, 1.5)),
            *(("height", value) for value in (0, -8, 10**9, 8.0)),
            *(("eta", value) for value in (math.nan, -1, 2)),
        ],
    )
    def test_numbers_that_nobody_means_are_refused(self, make_pipe, name, value):
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            make_pipe()([0], **{name: value})

    def test_there_are_no_more_steps_than_the_schedule_has(self, make_pipe):
        pipe = make_pipe(diffusers.EulerDiscreteScheduler(num_train_timesteps=10))
        with pytest.raises(ValueError, match="num_inference_steps must be at least 1 and at most 10, not 11"):
            pipe([0], num_inference_steps=11)
        assert pipe([0], num_inference_steps=10, output_type="np").images.shape == (1, 8, 8, 3)
