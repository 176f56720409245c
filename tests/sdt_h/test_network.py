import importlib.util

import pytest
import torch
import torch.nn.functional as F

from sdt_diffusion.attention import SPATIAL_DECAY_VARIANTS, ContextAwareGate
from sdt_diffusion.classification import SDTHNetwork
from sdt_diffusion.sdt_h.network import preset_config, raster_rotary_embedding
from tests.sdt_h.small import SMALL, images, small_network

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the packages onnx, onnxscript and onnxruntime are not installed",
)


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "fixed", "context"),
    [
        ("SDT-H-T", 14_334_216, 14_368_632),
        ("SDT-H-S", 26_967_240, 27_039_924),
        ("SDT-H-B", 54_154_896, 54_308_870),
    ],
)
def test_presets_have_rmts_parameters_and_the_gates(name, fixed, context):
    with torch.device("meta"):
        rmt = SDTHNetwork(**preset_config(name, spatial_decay="fixed"))
        network = SDTHNetwork(**preset_config(name))
    gates = [module for module in network.modules() if isinstance(module, ContextAwareGate)]
    assert count(rmt) == fixed
    # The literature counts projections and biases; the strength alpha of each head comes on top.
    assert count(network) - sum(gate.log_alpha.numel() for gate in gates) == context


def test_presets_are_the_papers():
    config = preset_config("SDT-H-B", num_labels=7)
    assert config["num_labels"] == 7
    assert config["depths"] == (4, 8, 25, 8)
    with torch.device("meta"):
        network = SDTHNetwork(**preset_config("SDT-H-S"))
    blocks = [block for stage in network.stages for block in stage.blocks]
    assert [stage.blocks[0].attn.decomposed for stage in network.stages] == [True, True, False, False]
    assert isinstance(blocks[0].drop_path, torch.nn.Identity)
    assert blocks[-1].drop_path.drop_prob == pytest.approx(0.15)
    assert blocks[14].drop_path.drop_prob == pytest.approx(0.15 * 14 / 28)


def test_starts_as_rmt():
    """At its start, `context` is `fixed`: gates without content give RMT's decay."""
    torch.manual_seed(0)
    fixed = small_network(spatial_decay="fixed")
    context = SDTHNetwork(**SMALL, num_labels=5).eval()
    context.load_state_dict(fixed.state_dict(), strict=False)
    torch.testing.assert_close(context(images()), fixed(images()), rtol=1e-4, atol=1e-5)


def test_initialization():
    torch.manual_seed(0)
    network = SDTHNetwork(**SMALL, num_labels=500, initializer_range=0.03)
    block = network.stages[2].blocks[0]
    assert network.head.weight.std().item() == pytest.approx(0.03, rel=0.05)
    assert block.attn.to_q.weight.std().item() == pytest.approx(0.03, rel=0.05)
    assert (block.attn.to_q.bias == 0).all()
    assert (block.attn.gate.proj.weight == 0).all()
    assert (block.layer_scale1.gamma == 1e-6).all()
    assert isinstance(network.stages[0].blocks[0].layer_scale1, torch.nn.Identity)


@pytest.mark.parametrize("variant", SPATIAL_DECAY_VARIANTS)
def test_every_variant_trains_every_parameter(variant):
    network = small_network(spatial_decay=variant, drop_path_rate=0.0).train()
    F.cross_entropy(network(images()), torch.tensor([1, 4])).backward()
    # Biases before a batch norm or a softmax cancel.
    cancel = {f"patch_embed.{i}.bias" for i in (0, 3, 6, 9)} | {"proj.bias"}
    for name, parameter in network.named_parameters():
        if name not in cancel and not name.endswith(("to_k.bias", "downsample.0.bias")):
            assert parameter.grad.abs().max() > 0, name


def test_rotary_turns_pairs_by_the_raster_index():
    cosines, sines = raster_rotary_embedding(6, 50)
    theta = torch.tensor([1.0, 0.01, 0.0001])
    for channel in range(6):
        angle = 49 * theta[channel // 2]
        torch.testing.assert_close(cosines[49, channel], angle.cos())
        torch.testing.assert_close(sines[49, channel], angle.sin())


@pytest.mark.parametrize("size", [(32, 32), (33, 33), (100, 75), (1, 90)])
def test_any_image_size_works(size):
    network = small_network()
    maps = network.forward_stages(images(size=size))
    sides = torch.tensor(size)
    assert network(images(size=size)).shape == (2, 5)
    for feature_map, reduction in zip(maps, (4, 4, 8, 16), strict=True):
        assert torch.equal(torch.tensor(feature_map.shape[-2:]), -(-sides // reduction))


def test_pictures_do_not_depend_on_their_batch():
    network = small_network()
    batch = images(num=3)
    torch.testing.assert_close(network(batch)[1:2], network(batch[1:2]))


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        network = small_network(drop_path_rate=0.0).train()
        for stage in network.stages:
            stage.gradient_checkpointing = checkpointing
        network(images()).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    network = small_network(depths=(1, 1, 1))
    compiled = torch.compile(network, fullgraph=True)
    with torch.no_grad():
        expected = network(images())
        torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-4)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(images(seed=1))


def test_compiled_training_gives_the_same_gradients():
    torch.compiler.reset()
    gradients = []
    for compile in (False, True):
        network = small_network(drop_path_rate=0.0, depths=(1, 1, 1)).train()
        run = torch.compile(network, fullgraph=True, backend="aot_eager") if compile else network
        run(images()).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def exported_logits(network, batch, path):
    """The logits of a batch by onnxruntime, from a graph that was exported with another batch size."""
    import onnxruntime

    example, dynamic_shapes = batch[:2], ({0: torch.export.Dim("batch")},)
    torch.onnx.export(network, (example,), path, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0])


@needs_onnx
def test_onnx_of_tinys_stages_gives_the_same_logits(tmp_path):
    torch.manual_seed(0)
    network = SDTHNetwork(**{**preset_config("SDT-H-T"), "depths": (1, 1, 2, 1)})  # all blocks would take a minute
    batch = images(num=5, size=(64, 96))
    for module in network.modules():
        if isinstance(module, ContextAwareGate):
            torch.nn.init.normal_(module.proj.weight, std=0.1)
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    with torch.no_grad():
        network(batch)  # running statistics
        expected = network.eval()(batch)
    assert (expected[0] - expected[1]).abs().max() > 0.05
    torch.testing.assert_close(exported_logits(network, batch, tmp_path / "tiny.onnx"), expected, rtol=1e-4, atol=1e-4)


@needs_onnx
def test_onnx_of_fixed_decay_gives_the_same_logits(tmp_path):
    network, batch = small_network(spatial_decay="fixed", depths=(1, 1, 1)), images(num=5, size=(64, 96))
    with torch.no_grad():
        expected = network(batch)
    logits = exported_logits(network, batch, tmp_path / "small.onnx")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_exported_programs_need_torch_only():
    program = torch.export.export(small_network(), (images(),))
    assert "sdt_diffusion" not in program.graph_module.code
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(seed=1)), small_network()(images(seed=1)))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"Unknown preset 'SDT-H-L': choose one of SDT-H-T, SDT-H-S, SDT-H-B"):
        preset_config("SDT-H-L")
    with pytest.raises(ValueError, match=r"Unknown config key\(s\) heads for SDT-H-T; known keys: num_channels"):
        preset_config("SDT-H-T", heads=3)
    with pytest.raises(ValueError, match="depths has 2 values, but hidden_sizes has 3 stages"):
        SDTHNetwork(**{**SMALL, "depths": (1, 1)})
    with pytest.raises(ValueError, match="width 32 cannot be cut into 5 heads"):
        SDTHNetwork(**{**SMALL, "num_attention_heads": (2, 5, 4)})
    with pytest.raises(ValueError, match="Unknown spatial_decay 'far'"):
        SDTHNetwork(**SMALL, spatial_decay="far")
    with pytest.raises(ValueError, match=r"drop_path_rate must be at least 0 and less than 1, not 1\.0"):
        SDTHNetwork(**SMALL, drop_path_rate=1.0)


@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (3, 64, 64)])
def test_images_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"images of shape \(batch, 3, height, width\), not \("):
        small_network()(torch.zeros(shape))
