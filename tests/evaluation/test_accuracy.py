import json
import shutil
from types import SimpleNamespace
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor, ViTModel

from sdt_diffusion.classification import SDTHImageProcessor
from sdt_diffusion.data import CorruptImageError
from sdt_diffusion.evaluation import accuracy
from sdt_diffusion.evaluation.accuracy import AccuracyArguments, evaluate_accuracy, open_labeled_images
from sdt_diffusion.evaluation.cost import count_cost
from sdt_diffusion.metrics.confusion import Confusion, PreparedImages, classify
from tests.sdt_h.small import small_model

NAMES = {0: "black", 1: "gray", 2: "white", 3: "a", 4: "b", 5: "c"}
GRAY = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "image_mean": [0.5]}


class ByBrightness(nn.Module):
    """Takes images for 0, 1 or 2 as they are dark, gray or bright."""

    dtype = torch.float32
    config = SimpleNamespace(num_labels=6)

    def forward(self, pixel_values):
        centers = torch.tensor([0.0, 0.5, 1.0, 5.0, 6.0, 7.0])
        return SimpleNamespace(logits=-(pixel_values.mean(dim=(1, 2, 3))[:, None] - centers).abs())


def processor(image, return_tensors, input_data_format=None):
    return {"pixel_values": torch.tensor(np.array(image)).float().reshape(1, 1, *image.shape[:2]) / 255}


@pytest.fixture
def folder(tmp_path):
    """Three classes of three gray pictures; the last of each is a wrong one: brighter by a class, white is black."""
    for i, name in enumerate(("black", "gray", "white")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for j, level in enumerate((i, i, (i + 1) % 3)):
            pixels = np.full((4, 4), (0, 128, 255)[level], np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{j}.png")
    return tmp_path / "images"


def arguments(tmp_path, dataset, **values):
    values = {"model": str(tmp_path / "model"), "output": tmp_path / "out" / "accuracy.json", "batch_size": 4} | values
    return AccuracyArguments(dataset=str(dataset), **values)


@pytest.fixture
def saved(tmp_path):
    """A small model for gray images, and its processor."""
    model = small_model(num_channels=1, num_labels=6, id2label=NAMES)
    model.save_pretrained(tmp_path / "model")
    SDTHImageProcessor(do_convert_rgb=False, image_std=[0.5], **GRAY).save_pretrained(tmp_path / "model")
    return model


@pytest.mark.parametrize(("batch_size", "num_workers"), [(2, 0), (4, 1), (64, 0)])
def test_known_predictions(tmp_path, folder, batch_size, num_workers):
    images = open_labeled_images(arguments(tmp_path, folder), num_channels=1)
    prepared = PreparedImages(images, processor, 1)
    confusion, speeds = classify(ByBrightness(), prepared, [0, 1, 2], batch_size, num_workers)
    assert confusion.within_data_set().tolist() == [[2, 1, 0, 0], [0, 2, 1, 0], [1, 0, 2, 0]]
    assert confusion.top1 == 6 / 9
    assert confusion.top5 == 1
    assert len(speeds) == max(9 // batch_size - 1, 1)  # whole batches, but for the first


def test_the_record_says_what_was_done_with_what(tmp_path, folder, saved):
    table = evaluate_accuracy(arguments(tmp_path, folder))
    record = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert [entry["name"] for entry in record["classes"]] == ["black", "gray", "white"]
    assert sum(entry["count"] for entry in record["classes"]) == 9
    assert record["data"] == {
        **{"dataset": ".../images", "split": None, "count": 9, "num_classes": 3, "classes_with_images": 3},
        "labels_matched_by": "name",
    }
    assert record["cost"]["multiply_adds"] == count_cost(saved, torch.zeros(1, 1, 16, 16)).multiply_adds
    assert record["cost"]["input_shape"] == [1, 16, 16]
    assert record["processor"]["crop_size"] == {"height": 16, "width": 16}
    assert record["model"]["class"] == "SDTHForImageClassification"
    assert record["kind"] == "accuracy"
    assert record["count"] == 9
    assert f"{record['top1']:.2%}" in table
    assert Image.open(tmp_path / "out" / "accuracy.png").size[0] > 300


def test_accuracy_is_the_models(tmp_path, saved):
    evaluate_accuracy(arguments(tmp_path, "digits", batch_size=256, model=_ten_labels(tmp_path)))
    record = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    images = open_labeled_images(arguments(tmp_path, "digits"), 1)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "ten").eval()
    gray = SDTHImageProcessor.from_pretrained(tmp_path / "ten")
    pictures = [np.array(picture)[None] for picture, _ in images.__getitems__(range(len(images)))]
    with torch.no_grad():
        logits = model(gray(pictures, return_tensors="pt").pixel_values).logits
    predicted = logits.argmax(dim=1).numpy()
    assert record["top1"] == (predicted == images.labels).mean()
    expected = nn.functional.cross_entropy(logits, torch.tensor(images.labels)).item()
    assert record["loss"] == pytest.approx(expected, rel=1e-5)
    best = logits.topk(5).indices.numpy()
    assert record["top5"] == pytest.approx((best == images.labels[:, None]).any(axis=1).mean())


def _ten_labels(tmp_path):
    small_model(num_channels=1, num_labels=10, id2label={i: f"LABEL_{i}" for i in range(10)}).save_pretrained(
        tmp_path / "ten"
    )
    SDTHImageProcessor(do_convert_rgb=False, image_std=[0.5], **GRAY).save_pretrained(tmp_path / "ten")
    return str(tmp_path / "ten")


def test_models_of_transformers_and_parquet_files(tmp_path):
    config = ViTConfig(
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        **{"image_size": 8, "patch_size": 4, "num_labels": 3},
    )
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    pictures = [Image.new("RGB", (9 + i, 7), (40 * i, 0, 0)) for i in range(5)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    table = {"img": pictures, "label": [0, 2, 1, 1, 0]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "data.parquet")
    evaluate_accuracy(arguments(tmp_path, tmp_path / "data.parquet", dtype="bfloat16"))
    record = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert record["data"]["labels_matched_by"] == "name"
    assert record["top5"] is None
    assert [entry["count"] for entry in record["classes"]] == [2, 2, 1]


def test_a_backbone_without_classifier_is_refused(tmp_path, folder):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    ViTModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no weights that fit for .*classifier\.weight.*: is it trained"):
        evaluate_accuracy(arguments(tmp_path, folder))
    with pytest.raises(FileNotFoundError, match="cannot be loaded as an image classifier"):
        evaluate_accuracy(arguments(tmp_path, folder, model=str(folder)))


def test_corrupt_images_are_named(tmp_path, folder, saved):
    (folder / "gray" / "1.png").write_bytes(b"no image")
    for num_workers in (0, 1):
        with pytest.raises(CorruptImageError, match=r"Cannot read the image of row 4 \(.*gray/1\.png\)"):
            evaluate_accuracy(arguments(tmp_path, folder, dataloader_num_workers=num_workers))
    assert not list((tmp_path / "out").iterdir())


def test_empty_class_folders_are_refused(tmp_path, folder, saved):
    (folder / "blue").mkdir()
    with pytest.raises(ValueError, match="1 class folder"):
        evaluate_accuracy(arguments(tmp_path, folder))


def test_several_splits_need_a_choice(tmp_path, folder, saved):
    for split in ("train", "test"):
        shutil.copytree(folder, tmp_path / "splits" / split)
    with pytest.raises(ValueError, match="it has the splits train, test: name one as dataset_split"):
        evaluate_accuracy(arguments(tmp_path, tmp_path / "splits"))
    evaluate_accuracy(arguments(tmp_path, tmp_path / "splits", dataset_split="test"))


def test_outputs_are_not_overwritten(tmp_path, folder):
    (tmp_path / "accuracy.png").touch()
    with pytest.raises(ValueError, match=r"accuracy\.png exists already"):
        evaluate_accuracy(arguments(tmp_path, folder, output=tmp_path / "accuracy.json"))
    with pytest.raises(ValueError, match=r"must end in \.json"):
        evaluate_accuracy(arguments(tmp_path, folder, output=tmp_path / "accuracy.txt"))


def test_an_output_that_cannot_be_written_is_refused_before_any_image(tmp_path, folder, saved, monkeypatch):
    monkeypatch.setattr(accuracy, "classify", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"No file can be written there.*file"):
        evaluate_accuracy(arguments(tmp_path, folder, output=tmp_path / "file" / "accuracy.json"))


def test_a_processor_of_other_channels_is_refused(tmp_path, folder, saved):
    SDTHImageProcessor(**{**GRAY, "image_mean": [0.5] * 3}).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="makes 3 channels, but the model takes 1"):
        evaluate_accuracy(arguments(tmp_path, folder))


def test_logits_that_are_not_finite_and_images_of_several_sizes_are_named(tmp_path, folder):
    images = open_labeled_images(arguments(tmp_path, folder), 1)

    class Broken(ByBrightness):
        def forward(self, pixel_values):
            logits = super().forward(pixel_values).logits
            return SimpleNamespace(
                logits=torch.where(pixel_values.mean(dim=(1, 2, 3))[:, None] > 0.9, torch.nan, logits)
            )

    prepared = PreparedImages(images, processor, 1)
    with pytest.raises(ValueError, match="row 5, are not finite"):
        classify(Broken(), prepared, [0, 1, 2], 4)
    confusion, _ = classify(Broken(), prepared, [0, 1, 2], 4, require_finite=False)
    assert np.isnan(confusion.loss)
    Image.new("L", (6, 4)).save(folder / "gray" / "1.png")
    images = open_labeled_images(arguments(tmp_path, folder), 1)
    with pytest.raises(ValueError, match=r"several shapes of .*\(1, 4, 4\) and \(1, 4, 6\)"):
        classify(ByBrightness(), PreparedImages(images, processor, 1), [0, 1, 2], 9)


@pytest.mark.parametrize("name", ["batch_size", "dataloader_num_workers"])
@pytest.mark.parametrize("value", [-1, 0.5, float("nan"), 10**30])
def test_numbers_that_make_no_sense_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        arguments(tmp_path, "digits", **{name: value})


def test_an_image_that_the_processor_would_enlarge_without_end_is_named(tmp_path, folder, saved):
    Image.new("L", (3000, 1)).save(folder / "gray" / "1.png")
    with pytest.raises(
        CorruptImageError,
        match=r"image of row 4 .* has 3000x1 pixels, and would have",
    ):
        evaluate_accuracy(arguments(tmp_path, folder))


def test_a_model_that_does_not_take_its_processors_images_is_named(tmp_path, folder):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**small, image_size=8, patch_size=4, num_labels=3)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    for side in (3, 12):
        ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="does not take what its image processor makes"):
            evaluate_accuracy(arguments(tmp_path, folder, match_labels="index"))


def test_names_of_classes_may_look_like_formulas(tmp_path, folder):
    (folder / "gray").rename(folder / "gray $^$")
    small_model(num_channels=1, num_labels=3).save_pretrained(tmp_path / "model")
    SDTHImageProcessor(do_convert_rgb=False, image_std=[0.5], **GRAY).save_pretrained(tmp_path / "model")
    evaluate_accuracy(arguments(tmp_path, folder, match_labels="index"))
    assert Image.open(tmp_path / "out" / "accuracy.png").size[0] > 300


def test_an_error_in_the_picture_does_not_lose_the_numbers(tmp_path, folder, saved, monkeypatch):
    monkeypatch.setattr(accuracy, "plot_confusion", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        evaluate_accuracy(arguments(tmp_path, folder))
    assert 0 <= json.loads((tmp_path / "out" / "accuracy.json").read_text())["top1"] <= 1


def test_a_loss_that_is_not_finite_is_an_error(tmp_path, folder, saved, monkeypatch):
    found = Confusion(np.arange(3), np.eye(6, dtype=np.int64)[:3], np.ones(3), float("inf"))
    monkeypatch.setattr(accuracy, "classify", lambda *_: (found, [1.0]))
    with pytest.raises(ValueError, match="loss must be a finite number, not inf"):
        evaluate_accuracy(arguments(tmp_path, folder))
    assert not list((tmp_path / "out").iterdir())
