import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.layers import create_feature_extractor
from timm.models import load_checkpoint, model_parameters
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from timm.utils import ModelEmaV3

from sdt_diffusion.classification import SDTHForTimm
from tests.sdt_h.small import SMALL, images, small_model


def small(**kwargs):
    return timm.create_model("sdt_h_tiny", **{**SMALL, "num_classes": 5, **kwargs}).eval()


@pytest.mark.parametrize(("name", "millions"), [("sdt_h_tiny", 14.37), ("sdt_h_small", 27.04), ("sdt_h_base", 54.31)])
def test_timm_finds_the_models(name, millions):
    assert name in timm.list_models("sdt_h*")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert isinstance(model, SDTHForTimm)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert dict(model.named_modules())[model.default_cfg["first_conv"]].in_channels == 3
    assert dict(model.named_modules())[model.default_cfg["classifier"]].out_features == model.num_classes == 1000


def test_what_the_training_script_calls():
    model = small(drop_rate=0.1, drop_path_rate=0.2, in_chans=1, global_pool="avg").train()
    assert model.num_classes == 5
    assert model.stages[2].blocks[0].drop_path.drop_prob == pytest.approx(0.2)
    config = resolve_data_config({"input_size": (1, 96, 96)}, model=model)
    assert config["input_size"] == (1, 96, 96)
    assert config["interpolation"] == "bicubic"
    model.set_grad_checkpointing(enable=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.8)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    average = ModelEmaV3(model, decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    loss = torch.nn.functional.cross_entropy(model(images(channels=1)), torch.tensor([1, 4]))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model_parameters(model, exclude_head=True), 1.0)
    optimizer.step()
    average.update(model)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_the_validation_script_calls(tmp_path):
    model = small()
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "model.pth.tar")
    other = small(scriptable=False)
    load_checkpoint(other, tmp_path / "model.pth.tar")
    config = resolve_data_config({}, model=other, use_test_size=True)
    assert (config["crop_pct"], config["mean"]) == (0.875, (0.485, 0.456, 0.406))
    with torch.inference_mode():
        assert torch.equal(other(images()), model(images()))


def test_layer_decay_grows_with_depth():
    model = small()
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    names = [
        "patch_embed.0.weight",
        "stages.0.blocks.0.attn.to_q.weight",
        "stages.1.blocks.0.attn.to_q.weight",
        "stages.1.blocks.1.attn.to_q.weight",
        "stages.2.downsample.0.weight",
    ]
    scales = [scale[id(parameters[name])] for name in names]
    assert scales == sorted(scales)
    assert len(set(scales)) == len(scales)
    assert scale[id(parameters["proj.weight"])] == scales[-1]
    assert scale[id(parameters["head.weight"])] == 1
    for name, parameter in parameters.items():
        assert decay[id(parameter)] == (0.05 if parameter.ndim > 1 else 0), name
    assert param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay())


def test_features_and_head_make_the_logits():
    model = small()
    features = model.forward_features(images())
    assert features.shape == (2, model.num_features, 4, 4)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(images()))


def test_classifier_can_be_replaced_and_removed():
    model = small()
    assert model.get_classifier().out_features == 5
    model.reset_classifier(9)
    assert model(images()).shape == (2, 9)
    assert model.num_classes == 9
    model.reset_classifier(3, "catavgmax")
    assert model(images()).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images()).shape == (2, 80)
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, 40, 4, 4)
    assert small(num_classes=0)(images()).shape == (2, 40)


def test_a_classifier_without_pooling_gives_logits_at_every_place():
    model = small(num_classes=0, global_pool="")
    feature_map = model(images())
    model.reset_classifier(4)
    weight = model.head.weight.flatten(1)
    assert weight.std().item() == pytest.approx(0.02, rel=0.3)
    expected = torch.einsum("bchw,nc->bnhw", feature_map, weight)
    torch.testing.assert_close(model(images()), expected)
    assert small(num_classes=3, global_pool="")(images()).shape == (2, 3, 4, 4)
    model.reset_classifier(4, "avg")
    assert model(images()).shape == (2, 4)


@pytest.mark.parametrize("training", [False, True])
def test_new_layers_have_the_mode_and_data_type_of_the_model(training):
    model = small(dtype=torch.bfloat16).train(training)
    for arguments in ((7,), (7, "avgmax"), (0, ""), (2, "")):
        model.reset_classifier(*arguments)
        assert {module.training for module in model.modules()} == {training}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_options_that_every_timm_model_takes():
    assert {tensor.device.type for tensor in small(device="meta").state_dict().values()} == {"meta"}
    with torch.device("meta"):
        assert {parameter.device.type for parameter in small(device="cpu").parameters()} == {"cpu"}
    model = small(device="cpu", dtype=torch.float64)
    assert model(images().double()).dtype == torch.float64
    torch.manual_seed(0)
    expected = small()
    torch.manual_seed(0)
    model = small(img_size=(32, 48), device=torch.device("cpu"), dtype=None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    for size in ((32, 48), (64, 64)):
        assert model(images(size=size)).shape == (2, 5)


@pytest.mark.parametrize("feature_cls", ["getter", "fx", "hook", "list", "dict"])
def test_every_feature_class_gives_the_outputs_of_the_stages(feature_cls):
    full, options = small(), {"features_only": True, "feature_cls": feature_cls, "out_indices": (0, 2)}
    model = timm.create_model("sdt_h_tiny", **SMALL, **options).eval()
    weights = {name.replace("stages.", "stages_"): tensor for name, tensor in full.state_dict().items()}
    weights = {name.replace("patch_embed.", "patch_embed_"): tensor for name, tensor in weights.items()}
    for module in (model, getattr(model, "model", model), getattr(model, "graph_module", model)):
        for state_dict in (weights, full.state_dict()):
            module.load_state_dict(state_dict, strict=False)
    feature_maps = model(images())
    feature_maps = feature_maps.values() if isinstance(feature_maps, dict) else feature_maps
    expected = full.forward_stages(images())
    for feature_map, index in zip(feature_maps, (1, 3), strict=True):
        assert torch.equal(feature_map, expected[index])
    assert model.feature_info.channels() == [16, 32]


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_scripting_is_refused_with_what_to_use():
    with pytest.raises(TypeError, match=r"SDT-H cannot be scripted.*use torch\.compile \(--torchcompile in timm's"):
        torch.jit.script(small())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:FutureWarning")
def test_a_traced_model_gives_the_same_logits_for_other_images():
    model = small()
    traced = torch.jit.trace(model, images())
    torch.testing.assert_close(traced(images(num=3, seed=1)), model(images(num=3, seed=1)))


def test_a_symbolically_traced_model_gives_the_same_logits():
    model = small()
    traced = create_feature_extractor(model, ["head"])
    assert torch.equal(traced(images(seed=1))["head"], model(images(seed=1)))


def test_every_parameter_gets_a_gradient():
    model = small(drop_path_rate=0.0).train()
    model(images()).mean().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_features_only():
    full = small()
    model = timm.create_model("sdt_h_tiny", features_only=True, out_indices=(0, 2), **SMALL).eval()
    assert model.feature_info.channels() == [16, 32]
    assert model.feature_info.reduction() == [4, 16]
    missing, unexpected = model.model.load_state_dict(full.state_dict(), strict=False)
    assert not missing
    assert {name.split(".")[0] for name in unexpected} == {"proj", "norm", "head"}
    expected = full.forward_stages(images())
    for feature_map, index in zip(model(images()), (1, 3), strict=True):
        assert torch.equal(feature_map, expected[index])
    default = timm.create_model("sdt_h_tiny", features_only=True)
    assert default.feature_info.channels() == [64, 128, 256, 512]
    assert default.feature_info.reduction() == [4, 8, 16, 32]


def test_intermediates():
    model = small()
    output, maps = model.forward_intermediates(images())
    assert torch.equal(output, model.forward_features(images()))
    assert len(maps) == 3
    output, maps = model.forward_intermediates(images(), indices=[-2], stop_early=True)
    assert torch.equal(output, maps[0])
    assert maps[0].shape == (2, 32, 8, 8)
    assert model.prune_intermediate_layers([0]) == [0]
    assert model(images()).shape == (2, 16, 16, 16)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', not 'NLC'"):
        model.forward_intermediates(images(), output_fmt="NLC")


def test_weights_saved_by_transformers_load(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    source = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
    loaded = small(pretrained=True, pretrained_cfg_overlay=source)
    assert torch.equal(loaded(images()), model(images()).logits)


def test_wrong_options_are_refused():
    with pytest.raises(TypeError, match="window_size"):
        small(window_size=7)
    with pytest.raises(ValueError, match=r"images of shape \(batch, 1, height, width\)"):
        small(in_chans=1)(images())
