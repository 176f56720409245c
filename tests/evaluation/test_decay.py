import math

import pytest
import torch

from sdt_diffusion.attention import SPATIAL_DECAY_VARIANTS
from sdt_diffusion.blocks import SDTAttention
from sdt_diffusion.evaluation.decay import BlockDecay, attention_maps, decay_maps, half_distances, record_decays
from tests.sdt_h.small import images, small_model

GRID = (2, 3)
GATE = -torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]])
ALPHA = torch.tensor([1.0, 2.0])


def block(variant="context", decomposed=False, attention=None):
    return BlockDecay(0, GATE, ALPHA, GRID, variant, decomposed, attention)


def attention_modules(model):
    return [module for module in model.modules() if isinstance(module, SDTAttention)]


def test_a_map_is_the_formula_for_one_head_and_patch():
    maps = decay_maps(block(), [(0, 2), (1, 0)])
    assert maps.shape == (2, 2, *GRID)
    # Head 1 (alpha 2) from patch (1, 0), token 3: 1/2 (G_3 + G_j) * distance * 2.
    expected = [[0.7 + 1.0, (0.7 + 0.9) * 2, (0.7 + 0.8) * 3], [0, 0.7 + 0.6, (0.7 + 0.5) * 2]]
    torch.testing.assert_close(maps[1, 1], torch.exp(-torch.tensor(expected)))


def test_other_variants():
    from_corner = decay_maps(block("content"), [(0, 0)])[0, 0]
    torch.testing.assert_close(from_corner[1, 2], torch.tensor(math.exp(-(0.1 + 0.6) / 2)))
    from_corner = decay_maps(block("raster"), [(0, 0)])[0, 0]
    torch.testing.assert_close(from_corner[1, 0], torch.tensor(math.exp(-(0.2 + 0.3 + 0.4))))


def test_decomposed_maps_are_the_product_of_both_passes():
    maps = decay_maps(block(decomposed=True), [(0, 0)])
    # Along column 0 to row 1 with the gates of tokens 0 and 3, then along row 1 with those of 3 and 5.
    expected = math.exp(-(0.1 + 0.4) / 2) * math.exp(-(0.4 + 0.6) / 2 * 2)
    assert maps[0, 0, 1, 2].item() == pytest.approx(expected)
    assert maps[0, 1, 0, 0] == 1
    assert maps[0, 1, 0, 1].item() == pytest.approx(math.exp(-(1.0 + 0.9) / 2 * 2))


def test_half_distances():
    uniform = BlockDecay(0, torch.full((1, 6), -math.log(2) / 4), torch.ones(1), GRID, "context", False, None)
    assert half_distances(uniform, [(0, 0), (1, 2)]).tolist() == [[pytest.approx(4)], [pytest.approx(4)]]
    halves = half_distances(block(), [(1, 0)])
    assert halves[0, 1].item() == pytest.approx(math.log(2) / ((0.75 + 0.7) / 2 * 2))
    assert half_distances(block("raster"), [(0, 0), (1, 0)]).shape == (2, 2)
    assert half_distances(block("content"), [(0, 0)]) is None


@pytest.mark.parametrize("variant", [name for name in SPATIAL_DECAY_VARIANTS if name != "none"])
def test_what_a_model_did_is_recorded(variant):
    model = small_model(spatial_decay=variant)
    modules = attention_modules(model)
    processors = [module.processor for module in modules]
    expected = model(images(num=1)).logits
    with torch.no_grad(), record_decays(model, attention=True) as decays:
        torch.testing.assert_close(model(images(num=1)).logits, expected)
    assert [decay.block for decay in decays] == [0, 2, 3]
    assert [decay.grid_size for decay in decays] == [(16, 16), (8, 8), (4, 4)]
    assert [decay.decomposed for decay in decays] == [True, False, False]
    assert [module.processor for module in modules] == processors
    for decay, module in zip(decays, (modules[0], *modules[2:]), strict=True):
        rows, columns = decay.grid_size
        assert decay.gate.shape == (module.heads, rows * columns)
        maps = attention_maps(decay, [(0, 0), (rows - 1, 1)])
        assert maps.shape == (2, module.heads, rows, columns)
        torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(2, module.heads))


def test_attention_that_was_not_recorded_cannot_be_mapped():
    model = small_model()
    with torch.no_grad(), record_decays(model) as decays:
        model(images(num=1))
    with pytest.raises(ValueError, match="attention=True"):
        attention_maps(decays[0], [(0, 0)])


@pytest.mark.parametrize("decomposed", [False, True])
def test_recorded_attention_is_what_the_values_go_through(decomposed):
    torch.manual_seed(0)
    attention = SDTAttention(16, 2, decomposed=decomposed)
    tokens = torch.randn(1, 6, 16)
    with torch.no_grad(), record_decays(attention, [0], attention=True) as decays:
        output = attention(tokens, GRID)
        value = attention.to_v(tokens).unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = (decays[0].attention @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention.to_out[0](mixed), output)


@pytest.mark.parametrize(
    ("model", "blocks", "message"),
    [
        (torch.nn.Linear(2, 2), (), "Linear has no spatial decay attention"),
        (SDTAttention(16, 2, spatial_decay="none"), (), "Block 0 has spatial_decay 'none': there is no decay to draw"),
        (SDTAttention(16, 2), (0, 1), r"There is no block 1: the model has blocks 0\.\.0"),
    ],
)
def test_what_has_no_decay_is_refused(model, blocks, message):
    with pytest.raises(ValueError, match=message), record_decays(model, blocks):
        pass


def test_one_image_at_a_time():
    attention = SDTAttention(16, 2)
    with record_decays(attention), pytest.raises(ValueError, match="one image at a time, not of 2"):
        attention(torch.randn(2, 6, 16), GRID)


def test_patches_beside_the_grid_are_refused():
    for patch in ((2, 0), (0, 3), (-1, 0)):
        for measure in (decay_maps, half_distances, attention_maps):
            with pytest.raises(ValueError, match="patches must be on the grid of 2 x 3"):
                measure(block(attention=torch.ones(2, 6, 6)), [patch])
