"""The head on a generative transformer."""

import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, pipeline

from sdt_diffusion.classification import SDTForImageClassification, SDTModel
from sdt_diffusion.probe import Backbone, load_backbone
from sdt_diffusion.sdt.schedulers import noise_scales
from sdt_diffusion.sdt.vae import encode_pixels
from sdt_diffusion.training.recipe import build_processor

NAMES = {0: "cat", 1: "dog", 2: "elk"}


@pytest.fixture
def make_probe(make_model):
    """Builds a head on a tiny transformer."""

    def make(transformer=None, scheduler=None, vae=None, **kwargs):
        backbone = Backbone(
            transformer or make_model(num_layers=3), scheduler or FlowMatchEulerDiscreteScheduler(), vae
        )
        torch.manual_seed(0)
        return SDTForImageClassification.from_backbone(backbone, id2label=NAMES, **kwargs).eval()

    return make


def images(num=2, size=8, seed=0):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def hidden_states(transformer, block, sample, timestep):
    """The tokens of a block, taken from a whole forward pass by a hook; the label is the null class."""
    seen = []
    handle = transformer.transformer_blocks[block].register_forward_hook(lambda *args: seen.append(args[-1]))
    labels = torch.full((len(sample),), transformer.config.num_classes)
    transformer(sample, torch.full((len(sample),), timestep), labels)
    handle.remove()
    return seen[0]


def fixed_noise(model, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(model.config.noise_seed))


@pytest.mark.parametrize("options", [{"num_registers": 2}, {"long_skips": True}, {"adaln": "single"}], ids=str)
def test_features_are_the_patches_after_the_block_whatever_the_models_options(make_model, make_probe, options):
    transformer = make_model(num_layers=5, **options)
    model = make_probe(transformer, block=3, timestep=250)
    noised = 0.75 * images() + 0.25 * fixed_noise(model, (3, 8, 8))
    labels = torch.full((2,), transformer.config.num_classes)
    (expected,) = transformer(noised, torch.full((2,), 250.0), labels, block_outputs=(3,)).block_outputs
    torch.testing.assert_close(model.forward_features(images()), expected)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_features_of_a_flow_are_the_transformers_hidden_states(make_model, make_probe, block):
    transformer = make_model(num_layers=3, class_dropout_prob=0.5)
    model = make_probe(transformer, block=block, timestep=250)
    noised = 0.75 * images() + 0.25 * fixed_noise(model, (3, 8, 8))
    expected = hidden_states(transformer, block, noised, 250.0)
    assert torch.equal(model.forward_features(images()), expected)
    features = model.norm(expected.mean(dim=1))
    torch.testing.assert_close(model(images()).logits, model.head(features))
    assert len(model.transformer.transformer_blocks) == block + 1


def test_features_of_a_ddpm_use_its_schedule(make_model, make_probe):
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=2e-2)
    transformer = make_model(num_layers=3)
    model = make_probe(transformer, scheduler, timestep=40)
    noise = fixed_noise(model, (3, 8, 8)).expand(2, -1, -1, -1)
    noised = scheduler.add_noise(images(), noise, torch.tensor([40, 40]))
    torch.testing.assert_close(model.forward_features(images()), hidden_states(transformer, 1, noised, 40))


def test_features_of_latents_go_through_the_vae(make_model, make_probe, tiny_vae):
    transformer = make_model(num_layers=3, in_channels=4)
    model = make_probe(transformer, vae=tiny_vae, timestep=100).train()
    assert not model.vae.training
    model.eval()
    latents = encode_pixels(tiny_vae, images(size=16))
    noised = 0.9 * latents + 0.1 * fixed_noise(model, (4, 8, 8))
    expected = hidden_states(transformer, 1, noised, 100.0)
    torch.testing.assert_close(model.forward_features(images(size=16)), expected)
    assert Backbone(transformer, FlowMatchEulerDiscreteScheduler(), tiny_vae).resolution == 16


def test_evaluation_depends_on_the_image_alone_and_training_draws_noise(make_probe):
    model = make_probe(timestep=500)
    logits = model(images(3)).logits
    torch.testing.assert_close(model(images(3)[1:2]).logits, logits[1:2])
    assert torch.equal(model(images(3)).logits, logits)
    model.train()
    assert (model.forward_features(images()) - model.forward_features(images())).abs().max() > 0.01


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_backbone_stays_as_it_is(make_model, make_probe, freeze):
    model = make_probe(make_model(num_layers=3, dropout=0.5), freeze_backbone=freeze).train()
    assert model.transformer.training != freeze
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(images(), labels=torch.tensor([2, 0])).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"head.weight", "head.bias", "norm.running_mean"} <= changed
    assert any(name.startswith("transformer.transformer_blocks.0") for name in changed) != freeze
    assert all(not name.startswith("transformer.") for name in changed) == freeze


def test_loads_in_a_fresh_process_and_in_pipelines(make_model, make_probe, tiny_vae, tmp_path):
    model = make_probe(make_model(num_layers=3, in_channels=4), vae=tiny_vae)
    model.save_pretrained(tmp_path)
    build_processor(3, 16, imagenet_normalization=False).save_pretrained(tmp_path)
    torch.save((images(size=16), model(images(size=16)).logits), tmp_path / "expected.pt")
    code = (
        "import torch, sdt_diffusion.classification\n"
        "from transformers import AutoModelForImageClassification\n"
        f"images, expected = torch.load(r'{tmp_path / 'expected.pt'}')\n"
        f"model = AutoModelForImageClassification.from_pretrained(r'{tmp_path}')\n"
        "assert not model.training and not any(p.requires_grad for p in model.transformer.parameters())\n"
        "torch.testing.assert_close(model(images).logits, expected)\n"  # with other threads than here
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    image = Image.effect_noise((16, 16), 60).convert("RGB")
    found = pipeline("image-classification", model=str(tmp_path))(image)
    assert {result["label"] for result in found} == set(NAMES.values())


def test_auto_model_gives_the_features_that_the_head_sees(make_model, make_probe, tiny_vae, tmp_path):
    model = make_probe(make_model(num_layers=3, in_channels=4), vae=tiny_vae)
    with torch.no_grad():
        model.norm.running_mean.normal_()
    model.save_pretrained(tmp_path)
    build_processor(3, 16, imagenet_normalization=False).save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, SDTModel)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    output = loaded(images(size=16))
    assert torch.equal(output.last_hidden_state, model.forward_features(images(size=16)))
    assert torch.equal(model.head(output.pooler_output), model(images(size=16)).logits)
    image = Image.effect_noise((16, 16), 60).convert("RGB")
    found = pipeline("image-feature-extraction", model=str(tmp_path), return_tensors=True)(image, pool=True)
    assert found.shape == (1, 32)


def test_weights_on_the_meta_device_leave_no_trace_in_later_models(make_model, make_probe, tmp_path):
    """transformers builds models there first; the fixed position embedding is kept between models."""
    make_probe().save_pretrained(tmp_path)
    AutoModelForImageClassification.from_pretrained(tmp_path)
    assert make_model().pos_embed.pos_embed.device.type == "cpu"


def test_a_folder_of_a_transformer_or_pipeline(make_model, make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path / "pipe")
    assert noise_scales(load_backbone(str(tmp_path / "pipe")).scheduler, 200) == (0.8, 0.2)
    signal, noise = noise_scales(load_backbone(str(tmp_path / "pipe" / "transformer"), "ddpm").scheduler, 999)
    assert signal**2 == pytest.approx(4.04e-5, rel=1e-2)
    assert signal**2 + noise**2 == pytest.approx(1)
    with pytest.raises(ValueError, match="objective 'ddpm' cannot be given for the pipeline"):
        load_backbone(str(tmp_path / "pipe"), "ddpm")


def test_what_does_not_fit_is_refused(make_model, make_probe):
    with pytest.raises(ValueError, match=r"^block must lie in 0\.\.2 for this transformer, not 3"):
        make_probe(block=3)
    with pytest.raises(ValueError, match=r"^timestep must be between 0 and 1000, .* for this model, not 1001"):
        make_probe(timestep=1001)
    with pytest.raises(ValueError, match=r"must be a whole number from 0 to 999 .* not 0.5"):
        make_probe(scheduler=DDIMScheduler(), timestep=0.5)
    latents = Backbone(make_model(in_channels=4), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="works in 4 channels, which are not pixels"):
        _ = latents.image_mode


def test_layer_decay_groups_reach_from_stem_to_head(make_probe):
    from timm.optim import param_groups_layer_decay

    model = make_probe(freeze_backbone=False, block=2)
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.0625, 0.125, 0.25, 0.5, 1.0]  # stem, blocks, head
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_gradient_checkpointing_changes_no_gradient(make_probe):
    gradients = []
    for checkpointed in (False, True):
        model = make_probe(freeze_backbone=False).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(images(), labels=torch.tensor([2, 0])).loss.backward()
        gradients.append(model.transformer.pos_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_hidden_states_are_the_tokens_that_the_head_sees(make_probe):
    model = make_probe()
    output = model(images(), output_hidden_states=True)
    assert torch.equal(output.hidden_states[0], model.forward_features(images()))
    assert model(images()).hidden_states is None


def test_labels_and_weights_that_do_not_fit_are_refused(make_probe, tmp_path):
    model = make_probe()
    with pytest.raises(ValueError, match=r"Labels must lie in 0..2 .*, got 1..3"):
        model(images(), labels=torch.tensor([1, 3]))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"head.bias is \(3,\), not \(7,\).*ignore_mismatched_sizes=True"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7)
