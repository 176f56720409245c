import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from sdt_diffusion.metrics.extraction import measure_dims
from sdt_diffusion.metrics.extractors import build_extractor
from sdt_diffusion.metrics.extractors.transformers_models import load_classifier, prepare_picture
from sdt_diffusion.training.recipe import build_processor
from sdt_diffusion.utils.reading import write_checksums
from tests.sdt_h.small import small_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)


def extract(extractor, *images):
    with torch.no_grad():
        return extractor(torch.stack([extractor.prepare(image) for image in images]))


@pytest.fixture
def vit(tmp_path):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=7)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    return tmp_path, model


def test_dinov2_gives_its_class_token_for_images_of_224_pixels(tmp_path):
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SMALL, image_size=224, patch_size=14)).eval()
    model.save_pretrained(tmp_path)
    extractor = build_extractor("dinov2", str(tmp_path))
    prepared = extractor.prepare(np.full((50, 40, 3), 255, dtype=np.uint8))
    assert prepared.shape == (3, 224, 224)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(prepared.amax(dim=(1, 2)), white)
    assert extractor.dims == {"pool": 32}
    with torch.no_grad():
        expected = model(extractor.prepare(IMAGE)[None]).pooler_output
    torch.testing.assert_close(extract(extractor, IMAGE)["pool"], expected)


def test_a_classifier_gives_its_logits_and_what_they_are_made_of(vit):
    folder, model = vit
    extractor = build_extractor(str(folder))
    found = extract(extractor, IMAGE, IMAGE[::-1].copy())
    assert found["logits"].shape == (2, 7)
    torch.testing.assert_close(model.classifier(found["pool"]), found["logits"])
    assert (found["logits"][0] - found["logits"][1]).abs().max() > 0


def test_a_convolutional_classifier_too(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = extract(build_extractor(str(tmp_path)), IMAGE)
    assert found["pool"].shape == (1, 16)
    torch.testing.assert_close(model.classifier(found["pool"]), found["logits"])


def test_classifiers_of_this_project_need_no_import(tmp_path):
    """In a process of its own: here they are known already. Gray images, as of the digits."""
    model = small_model(num_channels=1, depths=(1, 1, 1))
    model.save_pretrained(tmp_path)
    build_processor(1, 32).save_pretrained(tmp_path)
    torch.save(model.network.head.state_dict(), tmp_path / "head.pt")
    code = (
        "import numpy as np, torch\n"
        "from sdt_diffusion.metrics.extractors import build_extractor\n"
        f"extractor = build_extractor(r'{tmp_path}')\n"
        "batch = torch.stack([extractor.prepare(np.full((8, 8, 1), gray, np.uint8)) for gray in (0, 255)])\n"
        "assert batch.shape == (2, 1, 32, 32) and batch.min() == -1 and batch.max() == 1\n"
        "with torch.no_grad():\n"
        "    found = extractor(batch)\n"
        f"head = torch.load(r'{tmp_path / 'head.pt'}')\n"
        "expected = torch.nn.functional.linear(found['pool'], head['weight'], head['bias'])\n"
        "torch.testing.assert_close(found['logits'], expected)\n"
        "assert found['pool'].shape == (2, 40) and (found['logits'][0] != found['logits'][1]).any()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_moved_classifier_is_the_same_extractor(vit, tmp_path_factory):
    folder, _ = vit
    moved = tmp_path_factory.mktemp("moved") / "vit"
    folder.rename(moved)
    moved_again = moved.with_name("vit2")
    first = build_extractor(str(moved)).identity
    moved.rename(moved_again)
    assert build_extractor(str(moved_again)).identity == first


def test_another_image_processor_is_another_extractor(vit):
    folder, _ = vit
    first = build_extractor(str(folder)).identity
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0, 0, 0]).save_pretrained(folder)
    assert build_extractor(str(folder)).identity != first


def test_what_is_missing_is_named(tmp_path, vit):
    with pytest.raises(ValueError, match="extractor 'incption': it must be one of inception, cleanfid_clean"):
        build_extractor("incption")
    with pytest.raises(FileNotFoundError, match=r"cannot be loaded as an image classifier .*config.json"):
        build_extractor(str(empty_folder(tmp_path)))
    with pytest.raises(ValueError, match="holds a vit, not a DINOv2"):
        build_extractor("dinov2", str(vit[0]))
    with pytest.raises(ValueError, match="pixels takes none"):
        build_extractor("pixels", "weights.pth")


def empty_folder(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_a_backbone_without_a_classifier_is_refused(vit):
    """transformers would make up the classifier's weights."""
    folder, model = vit
    model.vit.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"no weights that fit for classifier\.bias, classifier\.weight: is it"):
        build_extractor(str(folder))


def test_a_classifier_saved_in_half_precision_computes_in_fp32(vit):
    folder, model = vit
    expected = extract(build_extractor(str(folder)), IMAGE)["pool"]
    model.to(torch.bfloat16).save_pretrained(folder)
    found = extract(build_extractor(str(folder)), IMAGE)["pool"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_pixels_are_features_of_small_images_only():
    extractor = build_extractor("pixels")
    assert torch.equal(extract(extractor, IMAGE)["pool"][0], torch.from_numpy(IMAGE).flatten().float() / 255)
    with pytest.raises(ValueError, match="its 12288 values are too many"):
        extractor.prepare(np.zeros((64, 64, 3), dtype=np.uint8))


def test_a_pickle_of_weights_is_not_read(vit):
    folder, model = vit
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"cannot be loaded as an image classifier .*model\.safetensors"):
        build_extractor(str(folder))


def test_a_models_own_code_does_not_run_and_nobody_is_asked(vit):
    folder, _ = vit
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    classes = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
    config = {"auto_map": classes, "model_type": "own", "architectures": ["Model"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="cannot be loaded as an image classifier"):
        build_extractor(str(folder))
    assert not (folder / "ran").exists()


def test_weights_that_are_nan_or_changed_are_refused(vit):
    folder, model = vit
    write_checksums(folder)
    with torch.no_grad():
        model.classifier.bias[2] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its SHA-256"):
        build_extractor(str(folder))
    (folder / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be used: classifier\.bias has values that are NaN"):
        build_extractor(str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"a": ' * 3000, b'{"image_size": "x", "size": 7}', bytes(900)])
def test_damaged_files_of_a_classifier_are_one_line(vit, name, content):
    folder, _ = vit
    (folder / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as error:
        measure_dims(build_extractor(str(folder)), IMAGE.shape)
    assert "\n" not in str(error.value)


def test_labels_without_names_are_refused(vit):
    folder, model = vit
    model.config.id2label = {3: "a", 7: "b", 8: "c", 9: "d", 10: "e", 11: "f", 12: "g"}
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"id2label in its config.json must give a name to each label from 0 on"):
        build_extractor(str(folder))


def test_pictures_that_a_processor_would_enlarge_without_end_are_refused(vit):
    processor = ViTImageProcessor.from_pretrained(vit[0])
    with pytest.raises(ValueError, match="its sides differ too much: 65000x1 pixels"):
        prepare_picture(Image.new("RGB", (65000, 1)), processor, 3)


def test_a_processor_with_settings_of_another_kind_is_refused(vit):
    folder, _ = vit
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_normalize": []}))
    with pytest.raises(
        ValueError, match=r"do_normalize in its preprocessor_config\.json must be true or false, not \[\]"
    ):
        load_classifier(str(folder), "float32", "cpu")
