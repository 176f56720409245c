import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from sdt_diffusion.classification import SDTHConfig, SDTHForImageClassification, SDTHImageProcessor, SDTHModel
from tests.sdt_h.small import SMALL, images, small_model, small_network

NAMES = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "elk"}


@pytest.fixture
def saved(tmp_path):
    """A folder with a small model and its image processor."""
    model = small_model(id2label=NAMES, label2id={name: i for i, name in NAMES.items()})
    model.save_pretrained(tmp_path / "model")
    size = {"crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 72}}
    SDTHImageProcessor(**size).save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_auto_classes_load_what_was_saved(saved):
    model, folder = saved
    assert isinstance(AutoConfig.from_pretrained(folder), SDTHConfig)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(loaded, SDTHForImageClassification)
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    assert loaded.config.network_config() == model.config.network_config()
    assert loaded.config.id2label == NAMES
    processor = AutoImageProcessor.from_pretrained(folder)
    assert isinstance(processor, SDTHImageProcessor)
    assert processor(Image.new("L", (90, 200)), return_tensors="pt").pixel_values.shape == (1, 3, 64, 64)


def test_auto_model_gives_features(saved, tmp_path):
    model, folder = saved
    loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(loaded, SDTHModel)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    output = loaded(images(), output_hidden_states=True)
    hidden_states = model(images(), output_hidden_states=True).hidden_states
    for state, expected in zip(output.hidden_states, hidden_states, strict=True):
        assert torch.equal(state, expected)
    assert torch.equal(output.last_hidden_state, hidden_states[-1])
    assert torch.equal(model.network.head(output.pooler_output), model(images()).logits)
    last_hidden_state, pooler_output = loaded(images(), return_dict=False)
    assert torch.equal(last_hidden_state, output.last_hidden_state)
    assert torch.equal(pooler_output, output.pooler_output)

    loaded.save_pretrained(tmp_path / "features")
    again = AutoModel.from_pretrained(tmp_path / "features")
    assert torch.equal(again(images()).pooler_output, output.pooler_output)


def test_feature_extraction_pipeline(saved):
    model, folder = saved
    image = Image.effect_noise((90, 80), 60).convert("RGB")
    extract = pipeline("image-feature-extraction", model=str(folder), return_tensors=True)
    pixel_values = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    assert torch.equal(extract(image), model.network.forward_features(pixel_values))
    logits = model.network.head(extract(image, pool=True))
    torch.testing.assert_close(logits, model(pixel_values).logits)


def test_pipeline_needs_one_import(saved):
    _, folder = saved
    code = (
        "import sdt_diffusion.classification\n"
        "from PIL import Image\n"
        "from transformers import pipeline\n"
        f"classify = pipeline('image-classification', model=r'{folder}')\n"
        "print(*(result['label'] for result in classify(Image.new('RGB', (90, 80)))))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert sorted(output.stdout.split()) == sorted(NAMES.values())


def test_pipeline_gives_the_models_probabilities(saved):
    model, folder = saved
    image = Image.effect_noise((90, 80), 60).convert("RGB")
    results = pipeline("image-classification", model=str(folder))(image)
    pixel_values = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    expected = model(pixel_values).logits[0].softmax(-1)
    for result in results:
        assert result["score"] == pytest.approx(expected[model.config.label2id[result["label"]]].item(), abs=1e-5)


def test_processor_normalizes_the_central_square():
    image = Image.new("RGB", (512, 256), (255, 0, 0))
    pixel_values = SDTHImageProcessor()(image, return_tensors="pt").pixel_values
    expected = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(pixel_values, expected.view(1, 3, 1, 1).expand(1, 3, 224, 224))


def test_loss_and_hidden_states():
    model = small_model()
    labels = torch.tensor([3, 0])
    output = model(images(), labels=labels, output_hidden_states=True)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert [tuple(state.shape) for state in output.hidden_states] == [
        *[(2, 16, 16, 16)] * 2,
        (2, 32, 8, 8),
        (2, 32, 4, 4),
    ]
    torch.testing.assert_close(model.network.forward_head(output.hidden_states[-1]), output.logits)
    assert model(images()).hidden_states is None
    loss, logits = model(images(), labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_soft_labels_as_the_problem_type_asks():
    model = small_model(problem_type="multi_label_classification")
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    output = model(images(), labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match=rf"Labels must lie in 0..4 \(num_labels is 5\), got .*{label}"):
        small_model()(images(), labels=torch.tensor([2, label]))
    with pytest.raises(ValueError, match=r"2 images need as many labels, not a tensor of shape \(3,\)"):
        small_model()(images(), labels=torch.tensor([1, 2, 3]))


def test_another_number_of_classes_needs_the_explicit_flag(saved):
    model, folder = saved
    with pytest.raises(RuntimeError, match=r"head.* \(5, 40\), not \(7, 40\).*ignore_mismatched_sizes=True"):
        SDTHForImageClassification.from_pretrained(folder, num_labels=7)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes=True"):
        AutoModelForImageClassification.from_pretrained(folder, num_labels=7)
    loaded = SDTHForImageClassification.from_pretrained(folder, num_labels=7, ignore_mismatched_sizes=True)
    head = loaded.network.head
    assert head.weight.shape == (7, 40)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert (head.bias == 0).all()
    expected, body = model.network.state_dict(), loaded.network.state_dict()
    assert all(torch.equal(body[key], expected[key]) for key in body if not key.startswith("head."))


def test_fixed_weights_start_context(tmp_path):
    """RMT's weights lack the gates; they start as RMT's decay, and nothing else moves."""
    model = small_model(spatial_decay="fixed")
    model.save_pretrained(tmp_path)
    loaded = SDTHForImageClassification.from_pretrained(tmp_path, spatial_decay="context")
    torch.testing.assert_close(loaded(images()).logits, model(images()).logits, rtol=1e-4, atol=1e-5)


def test_weights_of_the_bare_network_load(tmp_path):
    network = small_network()
    SDTHConfig(**SMALL, num_labels=5).save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = SDTHForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).logits, network(images()))


def test_gates_stay_in_fp32_when_loaded_in_bf16(saved):
    model, folder = saved
    loaded = SDTHForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    dtypes = {".gate." in name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    logits, expected = loaded(images().bfloat16()).logits, model(images()).logits
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


def test_gradient_checkpointing_reaches_the_stages():
    model = small_model(drop_path_rate=0.0).train()
    model.gradient_checkpointing_enable()
    assert all(stage.gradient_checkpointing for stage in model.network.stages)
    model(images(), labels=torch.tensor([1, 2])).loss.backward()
    assert model.network.stages[0].blocks[0].attn.to_q.weight.grad.abs().max() > 0


def test_presets_and_unknown_keys():
    config = SDTHConfig.from_preset("SDT-H-S", num_labels=10, spatial_decay="fixed")
    assert config.depths == [3, 4, 18, 4]
    assert (config.num_labels, config.spatial_decay) == (10, "fixed")
    with torch.device("meta"):
        assert SDTHForImageClassification.from_preset("SDT-H-T", num_labels=1000).num_parameters() == 14_368_744
    with pytest.raises(ValueError, match=r"Unknown config key\(s\) depth for SDT-H-T; known keys"):
        SDTHConfig.from_preset("SDT-H-T", depth=3)


def test_compiles_with_a_loss():
    torch.compiler.reset()
    model = small_model(depths=(1, 1, 1), spatial_decay="fixed")
    labels = torch.tensor([3, 0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images(), labels=labels)
    expected = model(images(), labels=labels)
    torch.testing.assert_close(compiled.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.loss, expected.loss, rtol=1e-4, atol=1e-4)
