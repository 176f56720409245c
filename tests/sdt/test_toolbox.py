"""Test diffusers' toolbox on our model and pipeline: what its users expect of every transformer."""

import re
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from sdt_diffusion import SDTGuidance, SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.sdt.presets import PLUS
from tests.conftest import TINY

PAGE = (Path(__file__).parents[2] / "docs" / "toolbox.md").read_text()
CPU = torch.device("cpu")
STEPS = 8


def inputs(dtype=torch.float32):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {"hidden_states": x, "timestep": torch.tensor([500.0, 30.0]), "class_labels": torch.tensor([1, 2])}


@torch.no_grad()
def run(model, dtype=torch.float32):
    return model(**inputs(dtype), return_dict=False)[0].float()


def samples(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    kwargs = {"num_inference_steps": STEPS, **kwargs}
    return pipe([0, 1], generator=generator, output_type="pt", **kwargs).images


@pytest.fixture
def lora_config():
    peft = pytest.importorskip("peft", reason="peft is an extra, for LoRA")

    def make(targets, **kwargs):
        return peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **kwargs)

    return make


class TestLoRA:
    def test_adapters_are_saved_and_loaded_by_the_pipeline(self, make_pipe, lora_config, tmp_path):
        from diffusers.training_utils import _collate_lora_metadata
        from peft.utils import get_peft_model_state_dict

        trained, plain = make_pipe(), samples(make_pipe())
        trained.transformer.add_adapter(lora_config(["to_q", "to_v", "to_out.0"], lora_alpha=4))
        expected = samples(trained)
        assert not torch.allclose(expected, plain, atol=1e-3)
        SDTPipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=get_peft_model_state_dict(trained.transformer),
            **_collate_lora_metadata({"transformer": trained.transformer}),
        )
        pipe = make_pipe()
        pipe.load_lora_weights(tmp_path, adapter_name="style", weight_name="pytorch_lora_weights.safetensors")
        close = lambda expected: torch.testing.assert_close(samples(pipe), expected, rtol=0, atol=1e-5)  # noqa: E731
        close(expected)
        assert pipe.get_active_adapters() == ["style"]
        pipe.set_adapters("style", 0.0)
        close(plain)
        pipe.set_adapters("style", 1.0)
        pipe.fuse_lora()
        close(expected)
        pipe.unfuse_lora()
        pipe.disable_lora()
        close(plain)
        pipe.enable_lora()
        close(expected)
        pipe.unload_lora_weights()
        close(plain)

    def test_a_model_saves_and_loads_an_adapter(self, make_model, lora_config, tmp_path):
        model, other = make_model(), make_model()
        model.add_adapter(lora_config(["to_q", "norm1.linear", "ff.net.2", "gate.proj"]))
        model.save_lora_adapter(tmp_path)
        other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
        assert torch.equal(run(other), run(model))

    def test_only_the_adapter_is_trained(self, make_model, lora_config):
        model = make_model()
        model.requires_grad_(False)
        model.add_adapter(lora_config(["to_q"]))
        model.train()(**inputs()).sample.square().mean().backward()
        assert {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None} == {
            "lora_A",
            "lora_B",
        }


def test_fused_projections_change_nothing_and_come_apart_again(make_model):
    model = make_model()
    expected, names = run(model), set(model.state_dict())
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model), expected)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_layerwise_casting_stores_blocks_in_eight_bits_and_keeps_gates_and_norms(make_model, compute_dtype):
    model = make_model()
    expected = run(model)
    model = model.to(compute_dtype)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, dtype in stored.items():
        kept = any(part in name for part in ("pos_embed", "norm", "gate", "time_class_embed"))
        assert (dtype == compute_dtype) if kept else (dtype == torch.float8_e4m3fn), name
    error = (run(model, compute_dtype) - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == stored  # cast back after use


@pytest.mark.parametrize(
    "kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
@pytest.mark.parametrize("to_disk", [False, True])
def test_group_offload_changes_neither_this_model_nor_others(make_model, tmp_path, kind, to_disk):
    model, other = make_model(), make_model()
    expected = run(other)
    model.enable_group_offload(CPU, CPU, offload_to_disk_path=str(tmp_path) if to_disk else None, **kind)
    assert torch.equal(run(model), expected)
    assert torch.equal(run(model), expected)  # a second time, after all has gone to disk
    assert torch.equal(run(other), expected)
    assert torch.equal(run(make_model()), expected)


@pytest.mark.parametrize("method", ["enable_group_offload", "enable_model_cpu_offload"])
def test_pipelines_offload(make_pipe, method):
    pipe, expected = make_pipe(), samples(make_pipe())
    options = {"onload_device": CPU, "offload_type": "leaf_level"} if "group" in method else {"device": "cpu"}
    getattr(pipe, method)(**options)
    assert torch.equal(samples(pipe), expected)


CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=1e6),
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "taylorseer lite": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, use_lite_mode=True
    ),
    "mag": lambda pipe: MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, threshold=0.5),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}


class TestCaches:
    @pytest.mark.parametrize("name", CACHES)
    def test_a_cache_saves_work_repeats_itself_and_can_be_taken_off(self, make_pipe, make_model, name):
        pipe = make_pipe(transformer=make_model(num_layers=3))
        expected, calls = samples(pipe), []
        pipe.transformer.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *args: calls.append(1))
        pipe.transformer.enable_cache(CACHES[name](pipe))
        cached = samples(pipe)
        assert len(calls) < STEPS
        assert 0 < (cached - expected).abs().mean() < 0.3
        assert torch.equal(samples(pipe), cached)
        pipe.transformer.disable_cache()
        assert torch.equal(samples(pipe), expected)

    def test_lite_taylorseer_predicts_the_output(self, make_pipe):
        """A Taylor series of order 0 repeats the last output; skipped blocks alone would leave zeros."""
        pipe = make_pipe()
        outputs = []
        pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        options = {"cache_interval": STEPS, "disable_cache_before_step": 1, "max_order": 0, "use_lite_mode": True}
        pipe.transformer.enable_cache(TaylorSeerCacheConfig(**options, taylor_factors_dtype=torch.float32))
        samples(pipe)
        assert outputs[-1].abs().min() > 0
        assert torch.equal(outputs[-1], outputs[-2])
        assert not torch.equal(outputs[0], outputs[-1])

    def test_faster_cache_leaves_out_the_null_class(self, make_pipe):
        pipe, sizes = make_pipe(), []
        pipe.transformer.transformer_blocks[0].ff.register_forward_hook(lambda m, a, out: sizes.append(len(out)))
        pipe.transformer.enable_cache(CACHES["faster"](pipe))
        samples(pipe)
        assert set(sizes) == {2, 4}

    @pytest.mark.parametrize("guider", [None, SDTGuidance.from_kind("autoguidance", guidance_scale=2.0)])
    def test_faster_cache_refuses_passes_without_the_null_class(self, make_pipe, make_model, guider):
        pipe = make_pipe(guider=guider, guide_transformer=make_model() if guider else None)
        pipe.transformer.enable_cache(CACHES["faster"](pipe))
        with pytest.raises(ValueError, match="set is_guidance_distilled=True, or guide by the null class"):
            samples(pipe, guidance_scale=2.0 if guider else 1.0)

    def test_mag_cache_calibrates(self, make_pipe, capsys):
        pipe, expected = make_pipe(), samples(make_pipe())
        pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=STEPS, calibrate=True))
        assert torch.equal(samples(pipe), expected)


class TestCompilation:
    """By the backend "eager", which traces as others do and takes no time to generate code."""

    def test_regional_compilation_makes_one_graph_for_all_blocks(self, make_model):
        model, compiled = make_model(num_layers=4), make_model(num_layers=4)
        counter = torch._dynamo.testing.CompileCounter()
        torch._dynamo.reset()
        compiled.compile_repeated_blocks(backend=counter, fullgraph=True)
        torch.testing.assert_close(run(compiled), run(model), rtol=0, atol=1e-6)
        assert counter.frame_count == 1

    def test_regional_compilation_works_beside_group_offload(self, make_model):
        model, expected = make_model(), run(make_model())
        torch._dynamo.reset()
        model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
        model.compile_repeated_blocks(backend="eager")
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6)

    def test_an_exported_program_is_loaded_without_the_model(self, make_model, tmp_path):
        model = make_model(num_layers=1, **PLUS)
        program = torch.export.export(model, (), {**inputs(), "return_dict": False})
        assert not [node for node in program.graph.nodes if "complex" in str(node.target)]  # ONNX has no such numbers
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        torch.testing.assert_close(run(loaded), run(model), rtol=0, atol=1e-5)


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_keeps_the_gates_in_fp32(self, make_pipe, tmp_path, dtype):
        pipe = make_pipe()
        pipe.save_pretrained(tmp_path)
        half = SDTPipeline.from_pretrained(tmp_path, dtype=dtype)
        half.set_progress_bar_config(disable=True)
        for name, parameter in half.transformer.named_parameters():
            assert parameter.dtype == (torch.float32 if "gate" in name else dtype), name
        torch.testing.assert_close(samples(half), samples(pipe), rtol=0, atol=0.05)

    def test_shards_and_variants(self, make_pipe, tmp_path):
        pipe = make_pipe()
        pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
        files = sorted(path.name for path in (tmp_path / "transformer").glob("*.safetensors"))
        assert len(files) > 2
        assert all(".fp16-0" in name for name in files)
        with pytest.raises((OSError, ValueError)):
            DiffusionPipeline.from_pretrained(tmp_path)  # there are no weights but the variant's
        loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(samples(loaded), samples(pipe))

    @pytest.mark.parametrize("most", ["60KB", "150KB"])
    def test_parts_may_stay_on_disk(self, make_model, tmp_path, most):
        model = make_model()
        model.save_pretrained(tmp_path, max_shard_size="50KB")
        options = {"device_map": "auto", "max_memory": {"cpu": most}, "offload_folder": str(tmp_path / "offload")}
        loaded = SDTTransformer2DModel.from_pretrained(tmp_path, **options)
        assert "disk" in loaded.hf_device_map.values()
        assert torch.equal(run(loaded), run(model))


class TestPipeline:
    def test_parts_make_another_pipeline(self, make_pipe):
        pipe = make_pipe()
        for other in (SDTPipeline(**pipe.components, id2label=pipe.id2label), SDTPipeline.from_pipe(pipe)):
            other.set_progress_bar_config(disable=True)
            assert torch.equal(samples(other), samples(pipe))
            assert other.labels == pipe.labels

    def test_dtype_and_device_of_a_pipeline(self, make_pipe):
        pipe = make_pipe()
        assert (pipe.dtype, pipe.device) == (torch.float32, CPU)
        assert pipe.to(torch.float16).dtype == torch.float16
        assert torch.isfinite(samples(pipe)).all()
        assert samples(pipe).dtype == torch.float32


class TestModel:
    def test_a_config_makes_the_same_model(self, make_model):
        model = make_model(qk_norm="rms_norm", rotary=True)
        again = SDTTransformer2DModel.from_config(model.config)
        assert dict(again.config) == dict(model.config)
        again.load_state_dict(model.state_dict())
        assert torch.equal(run(again), run(model))

    def test_a_model_is_deterministic_and_gives_tuples(self, make_model):
        model = make_model()
        with torch.no_grad():
            assert torch.equal(model(**inputs()).sample, run(model))
        assert torch.equal(run(model), run(model))

    def test_gradient_checkpointing_changes_no_gradient(self, make_model):
        gradients = []
        for checkpointing in (False, True):
            model = make_model(class_dropout_prob=0.0).train()
            if checkpointing:
                model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing is checkpointing
            model(**inputs()).sample.square().mean().backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)

    def test_every_parameter_is_trained(self, make_model):
        model = make_model().train()
        model(**inputs()).sample.square().mean().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        assert model.num_parameters(only_trainable=True) == model.num_parameters()
        assert set(TINY) < set(model.config)


def test_the_page_names_what_is_tested_and_its_examples_run(make_pipe, make_model, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="peft is an extra, for LoRA")
    monkeypatch.chdir(tmp_path)
    make_pipe(id2label=None, num_inference_steps=4).save_pretrained("outputs/small")
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        torch._dynamo.reset()
        exec(example, {})
