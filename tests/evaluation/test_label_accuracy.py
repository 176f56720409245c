import json

import numpy as np
import pytest

from sdt_diffusion.data import DataArguments, load_images
from sdt_diffusion.evaluation import label_accuracy as module
from sdt_diffusion.evaluation.label_accuracy import label_accuracy, main, shape_of_samples, svm_label_accuracy


@pytest.fixture(scope="module")
def digits():
    images = load_images(DataArguments(), default_resolution=8)
    pixels = np.stack([image.permute(1, 2, 0).numpy() for image, _ in images.__getitems__(range(len(images)))])
    return images, pixels / 2 + 0.5


def test_real_images_are_their_labels_and_shuffled_labels_are_chance(digits):
    images, pixels = digits
    assert svm_label_accuracy(images, pixels, images.labels) > 0.99
    wrong = np.random.default_rng(0).permutation(images.labels)
    assert svm_label_accuracy(images, pixels, wrong) == pytest.approx(0.1, abs=0.03)


def test_samples_of_another_size_are_refused(digits):
    with pytest.raises(ValueError, match=r"2 labels and samples of shape \(3, 8, 8, 1\)"):
        svm_label_accuracy(digits[0], np.zeros((3, 8, 8, 1)), [0, 1])
    with pytest.raises(ValueError, match=r"do not fit real images \(1797, 8, 8, 1\)"):
        svm_label_accuracy(digits[0], np.zeros((2, 16, 16, 1)), [0, 1])


def test_the_shape_of_samples_is_that_of_the_images_of_any_vae(make_pipe, make_model, tiny_vae, tiny_rae):
    assert shape_of_samples(make_pipe(transformer=make_model(in_channels=4), vae=tiny_vae)) == (16, 16, 3)
    rae = make_pipe(transformer=make_model(in_channels=64, sample_size=4), vae=tiny_rae)
    assert shape_of_samples(rae) == (16, 16, 3)


def test_results_carry_their_kind_and_the_settings_of_the_pipeline(make_pipe, make_model, digits, tmp_path, capsys):
    pipe = make_pipe(
        transformer=make_model(in_channels=1, num_classes=10), guidance_scale=1.5, num_inference_steps=2, id2label={}
    )
    pipe.save_pretrained(tmp_path / "model")
    main(["--model", str(tmp_path / "model"), "--num_images", "20", "--seed", "3"])
    results = json.loads(capsys.readouterr().out)
    assert results["kind"] == "label_accuracy"
    assert results["sampler"].startswith(
        "FlowMatchEulerDiscreteScheduler, 2 steps, 4 network evaluations, guidance 1.5"
    )
    settings = {"seed": 3, "guidance_scale": 1.5, "num_inference_steps": 2}
    assert results == label_accuracy(pipe, digits[0], 20, settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "./no"], "model: ./no holds no pipeline"),
        (["--dataset", "/no"], "There is no file or folder /no"),
        (["--scheduler", "DDIMScheduler"], "'DDIMScheduler' is not a scheduler for this flow-matching model"),
        (["--attention_backend", "fast"], "attention_backend 'fast' cannot be used. Unknown"),
        (["--num_images", "6"], "Class label 5 is out of range"),
    ],
)
def test_errors_are_one_line(  # the digits have ten classes, the model five
    make_pipe, make_model, tmp_path, flags, message
):
    make_pipe(transformer=make_model(in_channels=1), num_inference_steps=1).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as error:
        main(["--model", str(tmp_path / "model"), *flags])
    assert str(error.value).startswith("Error: ")
    assert message in str(error.value)


def test_a_damaged_model_is_named_in_one_line(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path / "model")
    weights = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"^Error: .*model"):
        main(["--model", str(tmp_path / "model")])


def test_wrong_values_are_refused_in_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["--model", "m", "--num_images", "0"])
    assert "num_images must be at least 1 and at most 1000000, not 0" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_anything_is_sampled(make_pipe, make_model, digits, monkeypatch):
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("too late"))
    gray = make_pipe(transformer=make_model(in_channels=1, num_classes=10), id2label={})
    colors, classes = make_pipe(), make_pipe(transformer=make_model(in_channels=1, num_classes=9), id2label={})
    with pytest.raises(ValueError, match="Class label 9 is out of range"):
        label_accuracy(classes, digits[0], 20, {})
    with pytest.raises(ValueError, match="Class label 5 is out of range"):
        label_accuracy(colors, digits[0], 20, {})
    with pytest.raises(ValueError, match="num_images must be at least 1, not 0"):
        label_accuracy(gray, digits[0], 0, {})
    monkeypatch.setattr(module, "MAX_SVM_VALUES", 1000)
    with pytest.raises(ValueError, match="1797 real images of 8x8 pixels are too many for an RBF SVM"):
        label_accuracy(gray, digits[0], 20, {})


def test_the_shape_of_samples_is_known(make_pipe, make_model, tiny_vae):
    assert shape_of_samples(make_pipe()) == (8, 8, 3)
    assert shape_of_samples(make_pipe(transformer=make_model(in_channels=4), vae=tiny_vae)) == (16, 16, 3)
    with pytest.raises(ValueError, match="makes images of 4 channels"):
        shape_of_samples(make_pipe(transformer=make_model(in_channels=4)))
