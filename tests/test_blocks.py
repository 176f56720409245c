import pytest
import timm.layers
import torch

from sdt_diffusion.attention import BACKENDS, SPATIAL_DECAY_VARIANTS
from sdt_diffusion.attention_processor import SDTAttnProcessor, set_decay_backend
from sdt_diffusion.blocks import SDTAttention, SDTBlock
from tests.conftest import randomize

GRID = (3, 4)
OPTIONS = [
    {},
    {"qk_norm": "rms_norm"},
    {"local_position_kernel_size": 3},
    {"decomposed": True},
    {"conditional_position_kernel_size": 3, "mlp_kernel_size": 3, "layer_scale_init_value": 0.5},
]


def test_conditioned_block_starts_as_the_identity():
    block = SDTBlock(16, 2, conditioning_dim=8)
    torch.nn.init.zeros_(block.norm1.linear.weight)
    torch.nn.init.zeros_(block.norm1.linear.bias)
    x = torch.randn(2, 12, 16)
    assert torch.equal(block(x, GRID, torch.randn(2, 8)), x)


@pytest.mark.parametrize("variant", SPATIAL_DECAY_VARIANTS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("conditioning_dim", [None, 8])
def test_every_option_trains_every_parameter(variant, options, conditioning_dim):
    torch.manual_seed(0)
    block = randomize(SDTBlock(16, 2, conditioning_dim=conditioning_dim, spatial_decay=variant, **options))
    conditioning = None if conditioning_dim is None else torch.randn(2, 8)
    output = block(torch.randn(2, 12, 16), GRID, conditioning)
    assert output.shape == (2, 12, 16)
    output.square().sum().backward()
    # A bias that all keys share cancels in the softmax.
    idle = {"attn.to_k.bias"} if "qk_norm" not in options else set()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert name in idle or parameter.grad.abs().max() > 0, name


def test_plain_block_equals_pre_norm_attention_and_mlp_by_torch():
    torch.manual_seed(0)
    block = SDTBlock(16, 2, spatial_decay="none", activation_fn="gelu")
    peer = torch.nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", norm_first=True, batch_first=True, layer_norm_eps=1e-6
    )
    attn = block.attn
    with torch.no_grad():
        projections = (attn.to_q, attn.to_k, attn.to_v)
        peer.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        peer.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    peer.self_attn.out_proj.load_state_dict(attn.to_out[0].state_dict())
    peer.linear1.load_state_dict(block.ff.net[0].proj.state_dict())
    peer.linear2.load_state_dict(block.ff.net[2].state_dict())
    x = torch.randn(2, 12, 16)
    torch.testing.assert_close(block(x, GRID), peer(x))


def test_local_position_encoding_adds_the_convolved_values():
    torch.manual_seed(0)
    attn = SDTAttention(16, 2, local_position_kernel_size=3)
    with_position = SDTAttention(16, 2)
    with_position.load_state_dict(attn.state_dict(), strict=False)
    x = torch.randn(2, 12, 16)
    image = attn.to_v(x).transpose(1, 2).reshape(2, 16, *GRID)
    position = attn.local_position.conv(image).flatten(2).transpose(1, 2)
    difference = attn(x, GRID) - with_position(x, GRID)
    torch.testing.assert_close(difference, position @ attn.to_out[0].weight.T)


def convolved(conv, tokens):
    image = tokens.transpose(1, 2).reshape(len(tokens), -1, *GRID)
    return conv(image).flatten(2).transpose(1, 2)


def test_convolutions_of_the_input_and_inside_the_mlp():
    torch.manual_seed(0)
    block = SDTBlock(16, 2, activation_fn="gelu", conditional_position_kernel_size=3, mlp_kernel_size=3)
    x = torch.randn(2, 12, 16)
    expected = x + convolved(block.conditional_position.conv, x)
    expected = expected + block.attn(block.norm1(expected), GRID)
    hidden = torch.nn.functional.gelu(block.ff.net[0].proj(block.norm2(expected)))
    expected = expected + block.ff.net[2](hidden + convolved(block.ff.local.conv, hidden))
    torch.testing.assert_close(block(x, GRID), expected)


@pytest.mark.parametrize("conditioning_dim", [None, 8])
def test_layer_scale_multiplies_both_branches(conditioning_dim):
    torch.manual_seed(0)
    plain = randomize(SDTBlock(16, 2, conditioning_dim=conditioning_dim))
    block = SDTBlock(16, 2, conditioning_dim=conditioning_dim, layer_scale_init_value=1.0)
    block.load_state_dict(plain.state_dict(), strict=False)
    x, conditioning = torch.randn(2, 12, 16), None if conditioning_dim is None else torch.randn(2, 8)
    torch.testing.assert_close(block(x, GRID, conditioning), plain(x, GRID, conditioning))
    for gamma in (block.layer_scale1.gamma, block.layer_scale2.gamma):
        torch.nn.init.zeros_(gamma)
    assert torch.equal(block(x, GRID, conditioning), x)


def test_drop_path_drops_branches_of_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block = SDTBlock(16, 2, drop_path=0.25, activation_fn="gelu")
    x = torch.randn(1, 12, 16).expand(4000, 12, 16)
    with torch.no_grad():
        expected = block.eval()(x[:1], GRID)
        output = block.train()(x, GRID)
    dropped = (output == x).flatten(1).all(dim=1).float().mean().item()
    assert dropped == pytest.approx(0.25**2, abs=0.015)  # both branches
    branch = expected - x[:1]
    assert (output.mean(dim=0, keepdim=True) - expected).norm() < 0.1 * branch.norm()


def test_layer_scale_and_drop_path_are_timms_with_names_and_starts_of_before():
    block = SDTBlock(16, 2, layer_scale_init_value=0.5, drop_path=0.25)
    assert isinstance(block.layer_scale1, timm.layers.LayerScale)
    assert isinstance(block.drop_path, timm.layers.DropPath)
    scales = {name: value for name, value in block.state_dict().items() if "layer_scale" in name}
    assert list(scales) == ["layer_scale1.gamma", "layer_scale2.gamma"]
    assert all(torch.equal(value, torch.full((16,), 0.5)) for value in scales.values())
    with torch.device("meta"):
        block = SDTBlock(16, 2, layer_scale_init_value=0.5)
    block.to_empty(device="cpu").layer_scale1.reset_parameters()
    assert torch.equal(block.layer_scale1.gamma, torch.full((16,), 0.5))


def test_one_call_chooses_the_backend_of_a_whole_model(monkeypatch):
    calls = []

    def attend(query, key, value, decay, scale):
        calls.append(decay.grid_size)
        return BACKENDS["reference"](query, key, value, decay, scale)

    monkeypatch.setitem(BACKENDS, "counted", attend)
    model = torch.nn.ModuleList(SDTBlock(16, 2) for _ in range(2))
    x = torch.randn(1, 12, 16)
    expected = [block(x, GRID) for block in model]
    set_decay_backend(model, "counted")
    for block, output in zip(model, expected, strict=True):
        torch.testing.assert_close(block(x, GRID), output)
    assert calls == [GRID, GRID]
    set_decay_backend(model, None)
    model[0](x, GRID)
    assert len(calls) == 2


def test_backends_of_models_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown attention backend 'flash'.*reference, dense, blockwise"):
        set_decay_backend(SDTBlock(16, 2), "flash")
    with pytest.raises(ValueError, match="Linear has no spatial decay attention"):
        set_decay_backend(torch.nn.Linear(2, 2), "dense")


def test_fused_projections_change_nothing():
    attn = randomize(SDTAttention(16, 2))
    x = torch.randn(2, 12, 16)
    expected = attn(x, GRID)
    attn.fuse_projections()
    torch.testing.assert_close(attn(x, GRID), expected)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="not divisible by 3 heads"):
        SDTAttention(16, 3)
    with pytest.raises(ValueError, match="Unknown qk_norm 'layer'"):
        SDTAttention(16, 2, qk_norm="layer")
    with pytest.raises(ValueError, match="must be odd or 0, not 4"):
        SDTAttention(16, 2, local_position_kernel_size=4)
    with pytest.raises(ValueError, match="mlp_kernel_size must be odd or 0, not 2"):
        SDTBlock(16, 2, mlp_kernel_size=2)
    with pytest.raises(ValueError, match=r"drop_path must be at least 0 and less than 1, not 1\.0"):
        SDTBlock(16, 2, drop_path=1.0)
    with pytest.raises(ValueError, match="Unknown spatial_decay"):
        SDTBlock(16, 2, spatial_decay="far")
    with pytest.raises(ValueError, match="Unknown attention backend 'fast'"):
        SDTAttnProcessor("fast")
    with pytest.raises(ValueError, match="needs conditioning"):
        SDTBlock(16, 2, conditioning_dim=8)(torch.randn(1, 12, 16), GRID)
    with pytest.raises(ValueError, match="takes no conditioning"):
        SDTBlock(16, 2)(torch.randn(1, 12, 16), GRID, torch.randn(1, 8))
