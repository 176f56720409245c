import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.attention import SPATIAL_DECAY_VARIANTS
from sdt_diffusion.blocks import SDTAttention
from sdt_diffusion.evaluation.cost import Cost, count_cost


def test_units():
    cost = Cost(parameters=7, multiply_adds=3 * 2**30)
    assert cost.gibi_multiply_adds == 3
    assert cost.gflops == pytest.approx(6.442450944)
    assert cost.as_dict() == {
        **{"parameters": 7, "multiply_adds": 3 * 2**30, "multiply_adds_2_30": 3},
        "gflops": pytest.approx(6.442450944),
    }


def test_a_linear_layer_and_a_convolution():
    assert count_cost(nn.Linear(20, 30), torch.zeros(2, 5, 20)) == Cost(20 * 30 + 30, 2 * 5 * 20 * 30)
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert count_cost(depthwise, torch.zeros(1, 8, 6, 4)).multiply_adds == 8 * 9 * 6 * 4


@pytest.mark.parametrize("variant", SPATIAL_DECAY_VARIANTS)
@pytest.mark.parametrize("decomposed", [False, True])
def test_attention(variant, decomposed):
    dim, heads, (height, width) = 16, 2, (4, 6)
    tokens = height * width
    attention = SDTAttention(dim, heads, spatial_decay=variant, decomposed=decomposed)
    processor = attention.processor
    pairs = tokens * (height + width if decomposed else tokens)
    gate = tokens * dim * heads if variant in ("context", "content", "raster") else 0
    cost = count_cost(attention, torch.zeros(1, tokens, dim), (height, width))
    assert cost.multiply_adds == 4 * tokens * dim**2 + 2 * pairs * dim + gate
    assert attention.processor is processor


def test_another_librarys_model():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config).eval()
    tokens, dim = 5, 16
    block = 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * tokens * dim * 32
    assert count_cost(model, torch.zeros(1, 3, 8, 8)).multiply_adds == 4 * dim * 3 * 16 + block + dim * 2


@pytest.mark.parametrize(
    ("preset", "side", "published"),
    [
        *[("SDT-S/2", 32, 6.06), ("SDT-B/2", 32, 23.01), ("SDT-L/2", 32, 80.71), ("SDT-XL/2", 32, 118.64)],
        ("SDT-XL/2", 64, 524.60),
    ],
)
def test_a_plain_dit_costs_what_its_paper_says(preset, side, published):
    """Counted without weights. The paper's Gflops are multiply-adds; its models also predict a variance."""
    with torch.device("meta"):
        model = SDTTransformer2DModel.from_preset(preset, spatial_decay="none", sample_size=side, out_channels=8)
        inputs = torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        cost = count_cost(model.to("meta").eval(), *inputs)
    assert cost.multiply_adds / 1e9 == pytest.approx(published, rel=1e-3)


def test_without_weights_the_decay_is_counted_as_with_them(make_model):
    model = make_model()
    inputs = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    assert count_cost(model.to("meta"), *(x.to("meta") for x in inputs)) == count_cost(make_model(), *inputs)
