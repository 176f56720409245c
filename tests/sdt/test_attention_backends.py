"""The model under the attention backends and caches of diffusers."""

import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from sdt_diffusion import attention_processor
from sdt_diffusion.attention import BACKENDS
from sdt_diffusion.attention.memory_efficient import load_xformers
from sdt_diffusion.attention_processor import FACTORED_BACKENDS, SDTAttnProcessor, describe_backend, set_decay_backend


def batch(channels=3, size=(8, 8), n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, channels, *size, generator=generator)
    return images, torch.tensor([10.0, 900.0])[:n], torch.tensor([1, 4])[:n]


class TestDiffusersAttentionBackends:
    @pytest.fixture(autouse=True)
    def restored_backend(self):
        """`set_attention_backend` also changes the default of the process."""
        active = _AttentionBackendRegistry._active_backend
        yield
        _AttentionBackendRegistry._active_backend = active

    @pytest.fixture
    def masks(self, monkeypatch):
        """The masks that diffusers' `_native_math` has received."""
        masks, attend = [], _AttentionBackendRegistry._backends["_native_math"]

        def record(query, key, value, attn_mask=None, **kwargs):
            masks.append(attn_mask)
            return attend(query, key, value, attn_mask=attn_mask, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, "_native_math", record)
        return masks

    @pytest.mark.parametrize("variant", ["context", "raster", "none"])
    def test_backends_of_the_model_give_the_same_output(self, make_model, variant):
        model = make_model(spatial_decay=variant)
        expected = model(*batch()).sample
        assert not torch.equal(expected, torch.zeros_like(expected))
        model.set_attention_backend("native")
        torch.testing.assert_close(model(*batch()).sample, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("options", [{}, {"decomposed": True}, {"spatial_decay": "raster"}])
    def test_the_context_is_honored(self, make_model, masks, options):
        model = make_model(**options)
        expected = model(*batch()).sample
        assert not masks
        with attention_backend("_native_math"):
            torch.testing.assert_close(model(*batch()).sample, expected, rtol=1e-4, atol=1e-4)
        passes = 4 if "decomposed" in options else 2
        assert [mask.max() <= 0 and mask.min() < 0 for mask in masks] == [True] * passes
        assert torch.equal(model(*batch()).sample, expected)
        assert len(masks) == passes

    def test_none_has_no_mask_in_the_context(self, make_model, masks):
        model = make_model(spatial_decay="none")
        expected = model(*batch()).sample
        with attention_backend("_native_math"):
            torch.testing.assert_close(model(*batch()).sample, expected, rtol=1e-4, atol=1e-4)
        assert masks == [None, None]

    def test_a_backend_of_ours_that_was_chosen_for_the_model_wins(self, make_model, masks):
        model = make_model()
        set_decay_backend(model, "dense")
        with attention_backend("_native_math"):
            model(*batch())
        assert not masks

    # The requirements of these are checked when the context is entered, and are not installed here.
    @pytest.mark.parametrize("name", ["sage", "sage_hub", "_native_npu", "_native_xla"])
    def test_backends_that_would_lose_the_decay_are_refused(self, make_model, name):
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName(name))
        with pytest.raises(ValueError, match=f"'{name}' cannot add the spatial decay.*native, _native_math.*flash"):
            make_model()(*batch())

    @pytest.fixture
    def flash(self, monkeypatch):
        """diffusers' backend `flash` as torch's kernel; the widths of the queries that it receives."""
        widths = []

        def attend(query, key, value, attn_mask=None, scale=None):
            assert attn_mask is None
            assert query.shape == key.shape == value.shape
            widths.append(query.shape[-1])
            heads_first = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)

        names = {"query", "key", "value", "attn_mask", "scale"}
        monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.FLASH, attend)
        monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, AttentionBackendName.FLASH, names)
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.FLASH)
        return widths

    @pytest.mark.parametrize(
        ("options", "columns"), [({}, 24), ({"decomposed": True}, 12), ({"spatial_decay": "none"}, 0)]
    )
    def test_backends_without_masks_get_the_decay_as_columns(self, make_model, flash, options, columns):
        model = make_model(**options)
        output = model(*batch()).sample
        set_decay_backend(model, "reference")
        torch.testing.assert_close(output, model(*batch()).sample, rtol=1e-4, atol=1e-4)
        head_dim = model.config.attention_head_dim
        assert set(flash) == {-(-(head_dim + columns) // 8) * 8 if columns else head_dim}

    @pytest.mark.parametrize("variant", ["content", "raster"])
    def test_variants_without_factors_are_refused_by_backends_without_masks(self, make_model, flash, variant):
        with pytest.raises(ValueError, match=f"'flash' takes no mask.*'context' and 'fixed', not '{variant}'"):
            make_model(spatial_decay=variant)(*batch())
        assert not flash

    def test_heads_too_wide_for_a_kernel_are_refused(self, make_model, flash, monkeypatch):
        monkeypatch.setitem(FACTORED_BACKENDS, "flash", 16)
        with pytest.raises(ValueError, match=r"'flash' takes no mask.*columns on a grid of 4x4.*the kernel takes 16"):
            make_model()(*batch())

    def test_torchs_own_flash_kernel_trains_through_the_columns_of_the_decay(self, make_model):
        gradients = []
        for name in ("native", "_native_flash"):
            model = make_model()
            with attention_backend(name):
                model(*batch()).sample.square().mean().backward()
            gradients.append([p.grad for p in model.parameters()])
        for found, expected in zip(*reversed(gradients), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    def test_the_context_makes_no_graph_break(self, make_model):
        torch.compiler.reset()
        model = make_model()
        expected = model(*batch()).sample
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for name in ("_native_math", "_native_flash"):
            with attention_backend(name):
                torch.testing.assert_close(compiled(*batch()).sample, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compiled(*batch()).sample, expected, rtol=1e-4, atol=1e-4)


class TestOurBackendsByDiffusersMethods:
    def test_the_model_takes_our_names_too(self, make_model):
        model = make_model()
        expected = model(*batch()).sample
        assert backend_of(model) == "blockwise"
        for name in ("dense", "factored"):
            model.set_attention_backend(name)
            assert backend_of(model) == name
            torch.testing.assert_close(model(*batch()).sample, expected, rtol=1e-4, atol=1e-4)
        model.reset_attention_backend()
        assert backend_of(model) == "blockwise"
        with pytest.raises(
            ValueError, match=r"Unknown attention backend 'fast'.*reference, dense.*diffusers' .*native"
        ):
            model.set_attention_backend("fast")

    def test_xformers_is_chosen_where_its_kernels_run_and_refused_with_the_reason_elsewhere(
        self, make_model, monkeypatch
    ):
        model = make_model()
        monkeypatch.setitem(sys.modules, "xformers.ops", None)  # as if it were not installed
        load_xformers.cache_clear()
        with pytest.raises(ValueError, match=r"'xformers' does not run on (cpu|cuda) in torch.float16: .*xformers"):
            model.enable_xformers_memory_efficient_attention()
        with pytest.raises(ValueError, match="attention_op must be None"):
            model.enable_xformers_memory_efficient_attention(attention_op=object())
        assert backend_of(model) == "blockwise"
        monkeypatch.setattr(attention_processor, "load_xformers", lambda *_: None)
        model.enable_xformers_memory_efficient_attention()
        assert backend_of(model) == "xformers"
        model.disable_xformers_memory_efficient_attention()
        assert backend_of(model) == "blockwise"


def backend_of(model, device="cpu", dtype=torch.float32):
    return describe_backend(model, device, dtype)


def test_what_computes_attention_can_be_asked_for(make_model, monkeypatch):
    model = make_model(attention_head_dim=16)
    assert backend_of(model) == "blockwise"
    assert backend_of(model, torch.device("cuda"), torch.float64) == "dense"
    set_decay_backend(model, "blockwise", prune_eps=1e-4)
    assert backend_of(model) == "blockwise pruned to 0.0001"
    set_decay_backend(model, None)
    monkeypatch.setenv("SDT_ATTENTION_BACKEND", "factored")
    assert backend_of(model) == "factored"
    for name, text in (
        ("_native_math", "diffusers' _native_math"),
        ("_native_flash", "diffusers' _native_flash of factors"),
    ):
        with attention_backend(name):
            assert backend_of(model) == text
    model.transformer_blocks[0].attn.processor.backend = lambda *_: None
    assert backend_of(model) == "a function, factored"
    model.transformer_blocks[1].attn.processor = len
    assert backend_of(model) == "a function, builtin_function_or_method"
    assert backend_of(make_model(spatial_decay="raster")) == "reference"
    assert backend_of(make_model(spatial_decay="none")) == "scaled_dot_product_attention"
    assert backend_of(torch.nn.Linear(2, 2)) == ""


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0(), lambda attn, hidden_states: None, None])
def test_processors_that_know_no_grid_are_refused(make_model, processor):
    with pytest.raises(ValueError, match="as it takes no grid_size: use SDTAttnProcessor"):
        make_model().set_attn_processor(processor)


def test_a_processor_of_ones_own_is_called(make_model):
    def attend(attn, hidden_states, grid_size, *rest):
        return torch.zeros_like(hidden_states)

    model = make_model()
    expected = model(*batch()).sample
    model.set_attn_processor(attend)
    assert not torch.allclose(model(*batch()).sample, expected)
    model.set_attn_processor(SDTAttnProcessor())
    assert torch.equal(model(*batch()).sample, expected)


def test_pruning_reaches_attention_and_is_refused_where_nothing_prunes(make_model, monkeypatch):
    received = []

    def attend(query, key, value, decay, scale):
        received.append(decay.prune_eps)
        return BACKENDS["reference"](query, key, value, decay, scale)

    monkeypatch.setitem(BACKENDS, "blockwise", attend)
    model = make_model()
    set_decay_backend(model, None, prune_eps=1e-3)
    model(*batch())
    assert received == [1e-3, 1e-3]
    with attention_backend("_native_math"), pytest.raises(ValueError, match="'_native_math' skips no tokens"):
        model(*batch())
    with pytest.raises(ValueError, match="'dense' skips no tokens: choose one of blockwise, triton"):
        set_decay_backend(model, "dense", prune_eps=1e-3)
    for eps in (-1.0, 0.6, float("nan"), "1e-3", True):
        with pytest.raises(ValueError, match="prune_eps must be"):
            set_decay_backend(model, None, prune_eps=eps)


def test_first_block_cache_hooks_find_the_blocks(make_model):
    model = make_model(num_layers=3)
    images, timestep, labels = batch()
    expected = model(images, timestep, labels).sample
    model.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    calls = []
    model.transformer_blocks[2].ff.register_forward_hook(lambda *_: calls.append(1))
    with model.cache_context("test"):
        torch.testing.assert_close(model(images, timestep, labels).sample, expected)
        model(images, timestep, labels)
    assert len(calls) == 1  # the second pass took the blocks after the first from the cache
