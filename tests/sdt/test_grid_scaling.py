"""Positions and distances on other grids than the trained one."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid

from sdt_diffusion import SDTPipeline
from sdt_diffusion.sdt.embeddings import position_embedding
from sdt_diffusion.sdt.grid_scaling import POSITION_SCALINGS, rotary_embedding

LABELS, TIMESTEPS = torch.tensor([0, 3]), torch.tensor([200.0, 700.0])
OTHER_GRIDS = [(8, 8), (2, 6), (6, 3)]


def noise(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def phases(dim, scaling, size=8, trained_size=4):
    """Return the phase of each frequency one patch from the first one, along the rows of a rotary embedding."""
    cosines, sines = rotary_embedding(2 * dim, (size, 1), (trained_size, 1), scaling)
    return torch.atan2(sines, cosines)[1, :dim:2].double()


@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_position_embedding_is_made_of_diffusers_sines(size):
    found = position_embedding(32, (size, 1), (4, 1))[0]
    positions = torch.arange(size, dtype=torch.float32) * (4 / size)
    assert torch.equal(found[:, 16:], get_1d_sincos_pos_embed_from_grid(16, positions).float())


def test_interpolated_positions_are_those_between_the_trained_ones():
    finer = position_embedding(32, (8, 6), (4, 3), scaling="interpolate")[0].view(8, 6, 32)
    assert torch.equal(finer[::2, ::2], position_embedding(32, (4, 3), (4, 3))[0].view(4, 3, 32))
    for fine, coarse in zip(
        rotary_embedding(16, (8, 6), (4, 3), "interpolate"), rotary_embedding(16, (4, 3), (4, 3)), strict=True
    ):
        assert torch.equal(fine.view(8, 6, 16)[::2, ::2], coarse.view(4, 3, 16))


def test_positions_that_are_not_scaled_continue_the_trained_ones():
    larger = position_embedding(32, (8, 6), (4, 3), scaling="none")[0].view(8, 6, 32)
    assert torch.equal(larger[:4, :3], position_embedding(32, (4, 3), (4, 3))[0].view(4, 3, 32))
    for large, small in zip(rotary_embedding(16, (8, 6), (4, 3)), rotary_embedding(16, (4, 3), (4, 3)), strict=True):
        assert torch.equal(large.view(8, 6, 16)[:4, :3], small.view(4, 3, 16))


@pytest.mark.parametrize(("size", "trained_size"), [(8, 4), (3, 4), (64, 4)])
def test_ntk_keeps_the_fastest_sine_and_interpolates_the_slowest(size, trained_size):
    dim, ratio = 16, size / trained_size
    plain = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    torch.testing.assert_close(phases(dim, "none", size, trained_size), plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(phases(dim, "interpolate", size, trained_size), plain / ratio, rtol=1e-5, atol=0)
    between = ratio ** -(torch.arange(dim // 2) / (dim // 2 - 1)).double()  # from 1 to 1/ratio
    torch.testing.assert_close(phases(dim, "ntk", size, trained_size), plain * between, rtol=1e-5, atol=0)
    second_row = position_embedding(2 * dim, (size, 1), (trained_size, 1), scaling="ntk")[0, 1, dim:].double()
    torch.testing.assert_close(torch.atan2(*second_row.chunk(2)), plain * between, rtol=1e-5, atol=0)


def test_ntk_leaves_a_single_frequency():
    for ntk, plain in zip(
        rotary_embedding(4, (8, 8), (4, 4), "ntk"), rotary_embedding(4, (8, 8), (4, 4)), strict=True
    ):
        assert torch.equal(ntk, plain)


@torch.no_grad()
@pytest.mark.parametrize("scaling", POSITION_SCALINGS)
def test_nothing_changes_on_the_trained_grid(make_model, scaling):
    model = make_model(rotary=True)
    expected = model(noise(8, 8), TIMESTEPS, LABELS).sample
    model.set_grid_scaling(scaling, scaling, decay_distance_scaling=True)
    assert torch.equal(model(noise(8, 8), TIMESTEPS, LABELS).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("grid_size", OTHER_GRIDS)
@pytest.mark.parametrize("variant", ["context", "raster"])
def test_a_scaled_distance_is_a_scaled_alpha(make_model, variant, grid_size):
    """Distances of the trained 4 x 4 patches; the raster's are its number of patches."""
    model = make_model(spatial_decay=variant)
    scaled, inputs = copy.deepcopy(model), (noise(2 * grid_size[0], 2 * grid_size[1]), TIMESTEPS, LABELS)
    area = 16 / math.prod(grid_size)
    for block in scaled.transformer_blocks:
        block.attn.gate.log_alpha += math.log(area if variant == "raster" else area**0.5)
    plain = model(*inputs).sample
    model.set_grid_scaling(decay_distance_scaling=True)
    torch.testing.assert_close(model(*inputs).sample, scaled(*inputs).sample, rtol=1e-5, atol=1e-5)
    assert (model(*inputs).sample - plain).abs().max() > 1e-4


@torch.no_grad()
def test_scaled_distances_and_guidance_multiply(make_model):
    model = make_model(decay_distance_scaling=True)
    sample, factors = noise(16, 16), torch.tensor([1.0, 4.0])
    expected = make_model()(sample, TIMESTEPS, LABELS, decay_scale=factors / 2).sample
    torch.testing.assert_close(model(sample, TIMESTEPS, LABELS, decay_scale=factors).sample, expected)
    model.to(torch.bfloat16)(sample.bfloat16(), TIMESTEPS, LABELS)


@torch.no_grad()
def test_models_without_the_options_sample_other_grids_as_before(make_model):
    model = make_model(rotary=True)
    inputs = (noise(12, 16), TIMESTEPS, LABELS)
    expected = model(*inputs).sample
    model.set_grid_scaling("interpolate", "none", decay_distance_scaling=False)
    assert torch.equal(model(*inputs).sample, expected)
    for changes in ({"pos_embed_scaling": "none"}, {"rotary_scaling": "ntk"}, {"decay_distance_scaling": True}):
        model = make_model(rotary=True, **changes)
        assert (model(*inputs).sample - expected).abs().max() > 1e-4


def test_the_choice_is_saved_with_the_model(make_pipe, tmp_path):
    pipe = make_pipe()
    pipe.transformer.set_grid_scaling("ntk", decay_distance_scaling=True)
    pipe.save_pretrained(tmp_path)
    loaded = SDTPipeline.from_pretrained(tmp_path)
    assert loaded.transformer.config.pos_embed_scaling == "ntk"
    kwargs = {"height": 12, "width": 16, "num_inference_steps": 2, "output_type": "np"}
    first, second = (each([0], generator=torch.Generator().manual_seed(0), **kwargs).images for each in (pipe, loaded))
    assert first.shape == (1, 12, 16, 3)
    assert (first == second).all()


def test_one_graph_serves_all_grids(make_model):
    torch.compiler.reset()
    scalings = {"pos_embed_scaling": "ntk", "rotary_scaling": "ntk", "decay_distance_scaling": True}
    model = make_model(num_layers=1, rotary=True, **scalings)
    torch.compiler.reset()  # graphs of other tests' models
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for height, width in ((12, 16), (20, 10)):
            inputs = (noise(height, width), TIMESTEPS, LABELS)
            torch.testing.assert_close(compiled(*inputs).sample, model(*inputs).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed_scaling": "linear"}, "pos_embed_scaling must be none or interpolate or ntk, not 'linear'"),
        ({"pos_embed_scaling": ["ntk"]}, r"pos_embed_scaling must be .*, not \['ntk'\]"),
        ({"rotary": True, "rotary_scaling": 2.0}, "rotary_scaling must be none or interpolate or ntk, not 2.0"),
        ({"rotary_scaling": "ntk"}, "rotary_scaling is 'ntk', but the model has no rotary embedding"),
        ({"decay_distance_scaling": 1}, "decay_distance_scaling must be true or false, not 1"),
        ({"spatial_decay": "content", "decay_distance_scaling": True}, "spatial_decay 'content' has none"),
        ({"spatial_decay": "none", "decay_distance_scaling": True}, "spatial_decay 'none' has none"),
    ],
)
def test_what_cannot_be_scaled_is_refused(make_model, changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)
    scalings = {name: changes.pop(name) for name in list(changes) if name.endswith("_scaling")}
    model = make_model(**changes)
    before = dict(model.config)
    with pytest.raises(ValueError, match=message):
        model.set_grid_scaling(**scalings)
    assert dict(model.config) == before


def test_the_example_of_the_documentation_runs(make_pipe):
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    example = re.search(r"```python\n(images = pipe.*?)```", page, re.DOTALL)[1]
    names = {"pipe": make_pipe(num_inference_steps=1)}
    exec(example.replace("[3, 7]", "[3, 4]"), names)
    assert names["images"][0].size == (16, 16)
    assert names["pipe"].transformer.config.pos_embed_scaling == "ntk"
