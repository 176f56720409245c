"""The wide head: what it computes, and that the tools of the backbone reach it."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from peft import LoraConfig
from torch.nn import functional as F

from sdt_diffusion import SDTGuidance, SDTTransformer2DModel
from sdt_diffusion.blocks import SDTBlock
from sdt_diffusion.sdt import TokenRoute
from sdt_diffusion.training.muon import muon_matrices
from tests.conftest import TINY, randomize

HEAD = {"head_layers": 2, "head_width": 48}


def batch(size=(8, 8)):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *size, generator=generator), torch.tensor([100.0, 900.0]), torch.tensor([1, 4])


@pytest.mark.parametrize("gate_conditioning", [True, False])
def test_a_block_takes_one_conditioning_for_all_tokens_or_one_for_each(gate_conditioning):
    torch.manual_seed(0)
    block = randomize(SDTBlock(32, 2, conditioning_dim=8, gate_conditioning=gate_conditioning))
    tokens, conditioning = torch.randn(2, 12, 32), torch.randn(2, 12, 8)
    same = conditioning[:, :1]
    expected = block(tokens, (3, 4), same[:, 0])
    torch.testing.assert_close(block(tokens, (3, 4), same.expand(-1, 12, -1)), expected)
    assert (block(tokens, (3, 4), conditioning) - expected).abs().max() > 0.01


def test_blocks_of_the_head_see_patches_of_the_image_and_the_backbones_tokens(make_model):
    model = make_model(**HEAD, num_registers=2)
    image, timestep, labels = batch()
    output = model(image, timestep, labels, block_outputs=(1,))
    c = model.time_class_embed(timestep, labels, torch.float32)
    head = model.wide_head
    conditioning = head.conditioning_proj(F.silu(output.block_outputs[0] + c[:, None]))
    tokens = F.conv2d(image, head.pos_embed.proj.weight, head.pos_embed.proj.bias, stride=2).flatten(2).mT
    for block in head.blocks:
        tokens = block(tokens, (4, 4), conditioning)
    shift, scale = model.proj_out_1(conditioning).chunk(2, dim=-1)
    patches = model.proj_out_2(F.layer_norm(tokens, (48,), eps=1e-6) * (1 + scale) + shift)
    expected = F.fold(patches.unflatten(-1, (4, 3)).mT.flatten(2).mT, (8, 8), 2, stride=2)
    torch.testing.assert_close(output.sample, expected, rtol=1e-4, atol=1e-4)


def test_it_starts_from_zero_as_every_model_and_leaves_the_backbone_as_it_starts():
    torch.manual_seed(0)
    plain = SDTTransformer2DModel(**TINY)
    torch.manual_seed(0)
    model = SDTTransformer2DModel(**TINY, **HEAD)
    assert model(*batch()).sample.count_nonzero() == 0
    weights = plain.transformer_blocks.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.transformer_blocks.state_dict().items())
    for block in model.wide_head.blocks:
        assert block.norm1.linear.weight.count_nonzero() == 0


def test_routes_and_the_strength_of_the_decay_and_other_grids_reach_it(make_model):
    model = make_model(**HEAD, num_layers=3, rotary=True)
    plain = model(*batch()).sample
    routed = model(*batch(), route=TokenRoute(torch.arange(8), 1, 2)).sample
    assert routed.shape == plain.shape
    assert not torch.equal(routed, plain)
    blocks = model.wide_head.blocks
    seen = []
    blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    assert not torch.equal(model(*batch(), decay_scale=torch.tensor([4.0, 4.0])).sample, plain)
    assert torch.equal(seen[0], torch.full((2, 1), 4.0))
    assert model(*batch((4, 12))).sample.shape == (2, 3, 4, 12)


def test_it_samples_with_guidance_of_the_decay_and_with_caches(make_model, make_pipe):
    pipe = make_pipe(transformer=make_model(**HEAD, num_layers=3), guider=SDTGuidance.from_kind("decay"))
    assert pipe([1, 2], num_inference_steps=2, output_type="pt").images.isfinite().all()
    pipe.guider = SDTGuidance()
    for config in (FirstBlockCacheConfig(threshold=0.5), TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True)):
        pipe.transformer.enable_cache(config)
        assert pipe([1, 2], num_inference_steps=4, output_type="pt").images.isfinite().all()
        pipe.transformer.disable_cache()


def test_muon_and_lora_change_its_matrices(make_model):
    model = make_model(**HEAD)
    names = [name for name in muon_matrices(model) if name.startswith("wide_head.")]
    assert len(names) == 2 * 7
    assert not any("conditioning_proj" in name or "pos_embed" in name for name in names)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    assert sum("wide_head" in name for name, p in model.named_parameters() if p.requires_grad) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_layers": -1}, "head_layers must be at least 0"),
        ({"head_layers": 1, "head_width": 46}, "head_width 46 must be divisible by 4 and by num_attention_heads 2"),
        ({"head_layers": 1, "head_width": 44, "rotary": True}, "head_width 44 .* 2, each divisible by 4 for rotary"),
        ({"head_layers": 1, "head_width": 48.5}, "head_width must be a whole number"),
        ({"head_layers": 100, "head_width": 65_536}, "The number of parameters is too large"),
    ],
)
def test_heads_that_make_no_model_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SDTTransformer2DModel(**TINY, **options)
