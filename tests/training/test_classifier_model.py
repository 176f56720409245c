import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdt_diffusion.sdt_h.modeling_sdt_h import SDTHImageProcessor
from sdt_diffusion.training.classifier_model import ClassifierModelArguments
from sdt_diffusion.training.recipe import build_processor
from sdt_diffusion.utils.arguments import parse_arguments
from tests.sdt_h.small import small_model

NAMES = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture
def folder(tmp_path):
    """A small classifier of five animals."""
    small_model(id2label=dict(enumerate(NAMES))).save_pretrained(tmp_path)
    return tmp_path


def build(folder, class_names=NAMES, num_channels=3, **flags):
    return ClassifierModelArguments(model=str(folder), **flags).build(num_channels, class_names, 8)


def test_the_same_classes_keep_every_weight(folder):
    model, stored = build(folder), load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    small_model().save_pretrained(folder)  # labels without names
    assert build(folder).config.id2label[4] == "elk"


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (NAMES[:3], "has 5 labels, the data set 3 classes"),
        ([*NAMES[:4], "fox"], "Label 4 is 'elk' to model .*, but 'fox' in the data set"),
        ([NAMES[1], NAMES[0], *NAMES[2:]], "Label 0 is 'ant' to .*, but 'bee' in .*the same names in another order"),
    ],
)
def test_other_classes_need_a_new_head_and_get_nothing_else_new(folder, class_names, message):
    with pytest.raises(ValueError, match=rf"{message}.*Set reinitialise_head"):
        build(folder, class_names)
    model, stored = build(folder, class_names, reinitialise_head=True), load_file(folder / "model.safetensors")
    assert list(model.config.id2label.values()) == class_names
    for name, tensor in model.state_dict().items():
        kept = tensor.shape == stored[name].shape and torch.equal(tensor, stored[name])
        assert kept != name.startswith("network.head."), name


@pytest.mark.parametrize("reinitialise_head", [False, True])
def test_no_other_weight_is_reinitialized(folder, reinitialise_head):
    with pytest.raises(ValueError, match=r"takes images of 3 channel\(s\), not of 1: set image_mode to RGB"):
        build(folder, num_channels=1, reinitialise_head=reinitialise_head)
    stored = load_file(folder / "model.safetensors")
    name = "network.patch_embed.0.weight"
    for weights in (
        {**stored, name: stored[name][:, :1].contiguous()},  # of another shape
        {key: tensor for key, tensor in stored.items() if key != name},
    ):
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "checksums.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=rf"has no weights that fit for {name}: is it trained"):
            build(folder, reinitialise_head=reinitialise_head)


def test_a_preset_has_no_head_to_initialize_again():
    with pytest.raises(ValueError, match="reinitialise_head does not apply to model SDT-H-T, which is a preset"):
        ClassifierModelArguments(reinitialise_head=True)


@pytest.mark.parametrize("flag", ["--reinitialise_head", "--reinitialize_head"])
def test_both_spellings_of_the_flag_are_taken(folder, flag):
    (arguments,) = parse_arguments((ClassifierModelArguments,), ["--model", str(folder), flag, "True"])
    assert arguments.reinitialise_head


def save_processor(folder, **values):
    sizes = {"size": {"shortest_edge": 73}, "crop_size": {"height": 64, "width": 64}}
    normalization = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    SDTHImageProcessor(**{**sizes, **normalization, **values}).save_pretrained(folder)


@pytest.mark.parametrize(
    ("resolution", "crop_pct", "sizes"),
    [(64, None, (73, 64)), (128, None, (146, 128)), (64, 1.0, (64, 64)), (32, 0.5, (64, 32))],
)
def test_the_folders_processor_is_kept_except_for_given_values(folder, resolution, crop_pct, sizes):
    save_processor(folder)
    arguments = ClassifierModelArguments(model=str(folder))
    assert arguments.default_resolution == 64
    processor = build_processor(3, resolution, crop_pct, base=arguments.processor)
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == sizes
    assert processor.crop_size["width"] == processor.crop_size["height"]
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert processor.resample == 2


def test_without_a_processor_the_defaults_hold(folder):
    arguments = ClassifierModelArguments(model=str(folder))
    assert (arguments.processor, arguments.default_resolution) == (None, 224)
    assert build_processor(3, 24).size["shortest_edge"] == 24


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_normalize": False}, "do_normalize is False"),
        ({"size": {"height": 64, "width": 64}}, "size is "),
        ({"crop_size": {"height": 64, "width": 32}}, "crop_size is "),
        ({"rescale_factor": 1.0}, r"rescale_factor is 1\.0"),
    ],
)
def test_a_processor_that_training_cannot_go_by_is_named(folder, values, message):
    save_processor(folder, **values)
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {message}.*remove the file"):
        ClassifierModelArguments(model=str(folder)).default_resolution  # noqa: B018
    save_processor(folder, image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ValueError, match=r"has 1 value\(s\) in image_mean, the images 3 channel\(s\)"):
        build_processor(3, 64, base=ClassifierModelArguments(model=str(folder)).processor)
    (folder / "preprocessor_config.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not an image processor's"):
        ClassifierModelArguments(model=str(folder)).processor  # noqa: B018


def test_a_preset_of_the_generative_transformer_makes_a_classifier_to_train_from_scratch():
    overrides = '{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}'
    args = ClassifierModelArguments(model="SDT-S/4+", spatial_decay="fixed", model_overrides=overrides)
    model = args.build(1, NAMES, 8)
    assert args.default_resolution == 32
    assert (model.config.num_labels, model.config.block, model.config.freeze_backbone) == (5, 1, False)
    assert model.transformer.config.spatial_decay == "fixed"
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model(images, labels=torch.tensor([0, 4, 2])).loss.backward()
    assert model.transformer.pos_embed.proj.weight.grad is not None
    assert torch.equal(*(model.eval()(images).logits for _ in range(2)))
    with pytest.raises(ValueError, match="drop_path does not apply to model SDT-S/4"):
        ClassifierModelArguments(model="SDT-S/4", drop_path=0.1)
