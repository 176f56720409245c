"""The model under the attention backends and caches of diffusers."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

from sdt_diffusion.attention_processor import set_decay_backend


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
    @pytest.mark.parametrize("name", ["flash", "flash_varlen", "_flash_3", "sage", "_native_flash", "_native_npu"])
    def test_backends_that_would_lose_the_decay_are_refused(self, make_model, name):
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName(name))
        with pytest.raises(ValueError, match=f"'{name}' cannot add the spatial decay.*native, _native_math"):
            make_model()(*batch())

    def test_the_context_makes_no_graph_break(self, make_model):
        torch.compiler.reset()
        model = make_model()
        expected = model(*batch()).sample
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for _ in range(2):
            with attention_backend("_native_math"):
                torch.testing.assert_close(compiled(*batch()).sample, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compiled(*batch()).sample, expected, rtol=1e-4, atol=1e-4)


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
