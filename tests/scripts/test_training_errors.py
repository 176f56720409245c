"""What the training scripts say of damaged files, bad values, full disks and folders in use: one line each."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdt_diffusion.data import DataArguments
from sdt_diffusion.data.latents.training_data import open_training_data
from sdt_diffusion.training import train_dit, validation
from sdt_diffusion.training.model_arguments import ModelArguments
from sdt_diffusion.training.validation import ValidationArguments
from sdt_diffusion.utils.files import LOCK_FILE
from tests.scripts.process import call

DIT, CLASSIFIER = "train/train_dit.py", "train/train_classifier.py"
SMALL = [
    *("--cpu_threads", "1", "--train_batch_size", "8", "--max_train_steps", "2", "--checkpointing_steps", "1"),
    *("--report_to", "none", "--lr_warmup_steps", "0"),
]
SMALL_DIT = [
    *(*SMALL, "--model_overrides", '{"num_layers": 1}', "--num_validation_images", "4", "--num_inference_steps", "1"),
    *("--label_accuracy_samples", "0"),
]


@pytest.fixture
def refused(tmp_path):
    """Run a script that must end by one line; return the line."""

    def run(script, *flags, output_dir=tmp_path / "out", left=()):
        result = call(script, *(SMALL_DIT if script == DIT else SMALL), "--output_dir", output_dir, *flags)
        lines = [line.rpartition("\r")[2] for line in result.stderr.splitlines()]
        said = [line for line in lines if line and not line.startswith(("Training:", "Sampling:"))]
        assert result.returncode in (1, 2)
        assert len(said) == 1, said
        assert sorted(path.name for path in tmp_path.glob("out/*")) == sorted(left)
        assert output_dir.is_dir() == bool(left) or output_dir != tmp_path / "out"
        return said[0]

    return run


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ('{"num_layers": "two"}', "num_layers|make no model"),
        ('{"num_layers": [2]}', "num_layers|make no model"),
        ('{"num_layers": null}', "num_layers|make no model"),
        ('{"activation_fn": {"a": 1}}', "activation_fn|make no model"),
        ('{"hidden": null}', "Unknown config key"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_model_overrides_of_wrong_types_make_no_model(refused, overrides, said):
    assert any(words in refused(DIT, "--model_overrides", overrides) for words in said.split("|"))


@pytest.mark.parametrize(
    "overrides", ['{"depths": "two"}', '{"depths": [1, 1, 1, null]}', '{"hidden_sizes": 3}', '{"mlp_ratios": {}}']
)
def test_model_overrides_of_wrong_types_make_no_classifier(refused, overrides):
    line = refused(CLASSIFIER, "--model_overrides", overrides)
    assert "make no model" in line or overrides.split('"')[1] in line


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "2", "1e30"])
def test_numbers_outside_their_range_are_refused(refused, value):
    assert "class_dropout_prob must be" in refused(DIT, "--class_dropout_prob", value)
    assert "drop_path must be" in refused(CLASSIFIER, "--drop_path", value)
    with pytest.raises(ValueError, match="class_dropout_prob must be"):
        ModelArguments(class_dropout_prob=float(value))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_nan(path):
    weights = load_file(path)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}, path, {"format": "pt"})


DAMAGES = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.fixture
def transformer(tmp_path):
    model = ModelArguments(model="SDT-digits", model_overrides='{"num_layers": 1}').build(
        sample_size=8, in_channels=1, num_classes=10
    )
    model.save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


@pytest.mark.parametrize("damage", [*DAMAGES])
def test_a_damaged_transformer_to_start_from_is_named(refused, transformer, damage):
    shutil.copytree(transformer, transformer.with_name("other"))
    DAMAGES[damage](transformer / "config.json")
    assert f"{transformer}" in refused(DIT, "--init_from", transformer)
    assert f"{transformer}" in refused(CLASSIFIER, "--model", transformer, "--image_mode", "L")
    other = transformer.with_name("other")
    (weights,) = other.glob("*.safetensors")
    DAMAGES[damage](weights)
    assert f"{other}" in refused(DIT, "--init_from", other)
    assert f"{other}" in refused(CLASSIFIER, "--model", other, "--image_mode", "L")


@pytest.mark.parametrize(
    "config",
    [[], {"_class_name": "DiTTransformer2DModel"}, {"_class_name": "SDTTransformer2DModel", "num_layers": "x"}],
)
def test_a_config_of_another_model_is_not_started_from(refused, transformer, config):
    (transformer / "config.json").write_text(json.dumps(config))
    assert f"{transformer}" in refused(DIT, "--init_from", transformer)


def test_weights_that_are_nan_are_not_started_from(refused, transformer):
    (weights,) = transformer.glob("*.safetensors")
    fill_with_nan(weights)
    (transformer / "checksums.json").unlink(missing_ok=True)
    assert "NaN or infinite" in refused(DIT, "--init_from", transformer)
    assert "NaN or infinite" in refused(CLASSIFIER, "--model", transformer, "--image_mode", "L")


TINY = {"hidden_sizes": [16] * 4, "depths": [1] * 4, "num_attention_heads": [2] * 4, "head_hidden_size": 8}


@pytest.fixture
def classifier(tmp_path):
    from sdt_diffusion.sdt_h.modeling_sdt_h import SDTHForImageClassification, SDTHImageProcessor

    names = {label: str(label) for label in range(10)}
    model = SDTHForImageClassification.from_preset("SDT-H-T", **TINY, num_channels=1, id2label=names)
    model.save_pretrained(tmp_path / "classifier")
    SDTHImageProcessor(image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.mark.parametrize("damage", [*DAMAGES])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_damaged_classifier_to_start_from_is_named(refused, classifier, damage, name):
    if name == "preprocessor_config.json" and damage in ("missing", "folder", "link to itself", "pipe"):
        return  # it may be left out
    DAMAGES[damage](classifier / name)
    assert f"{classifier}" in refused(CLASSIFIER, "--model", classifier, "--image_mode", "L", "--resolution", "8")


def test_a_processor_with_numbers_that_are_none_is_refused(refused, classifier):
    path = classifier / "preprocessor_config.json"
    values = json.loads(path.read_text())
    for wrong in (
        {"image_std": [0.0]},
        {"image_mean": "x"},
        {"crop_size": {"height": -1, "width": -1}},
        {"size": 5e9},
    ):
        path.write_text(json.dumps({**values, **wrong}))
        assert f"{path}" in refused(CLASSIFIER, "--model", classifier, "--image_mode", "L", "--resolution", "8")


def test_a_folder_that_cannot_be_written_is_named_at_the_start(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        for script in (DIT, CLASSIFIER):
            assert "No file can be written there" in refused(script, output_dir=folder)
    assert "tensorboard cannot start" in refused(
        DIT, "--report_to", "tensorboard", "--logging_dir", str(tmp_path / "file" / "logs")
    )


def test_a_second_run_on_the_same_new_folder_is_refused_before_its_first_step(refused, tmp_path):
    (tmp_path / "out").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "out" / LOCK_FILE], **pipes) as other:
        other.stdout.readline()
        assert "Another process is writing to" in refused(DIT, left=[LOCK_FILE])
        other.communicate("\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_inference_steps", "1001", "--objective", "ddpm"], "num_inference_steps"),
        (["--scheduler", "DDPMScheduler"], "is not a scheduler for this flow-matching model"),
        (["--attention_backend", "none such"], "attention_backend 'none such' cannot be used. Unknown"),
        (["--label_accuracy_samples", "1000000", "--resolution", "64"], "label_accuracy_samples is for small data"),
        (["--held_out_images", "1797"], "leaves none of the 1797 images"),
        (["--resolution", "7"], "is not divisible by patch_size"),
        (["--class_names", "/none/such"], "class_names"),
        (["--init_from", "/none/such"], "/none/such"),
        (["--pretrained_vae_model_name_or_path", "/none/such"], "/none/such"),
    ],
)
def test_what_validation_could_not_use_is_refused_before_training(refused, flags, said):
    assert said in refused(DIT, *flags)


def test_an_svm_needs_two_classes():
    data = open_training_data(DataArguments(), None, 8, 0)
    ValidationArguments(label_accuracy_samples=1).check_label_accuracy(data)
    data.images.labels = np.zeros_like(data.images.labels)
    with pytest.raises(ValueError, match="images of at least two classes"):
        ValidationArguments(label_accuracy_samples=1).check_label_accuracy(data)


def test_a_full_disk_in_the_last_save_names_the_last_checkpoint_and_leaves_nothing_half_written(
    refused, monkeypatch, tmp_path
):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written = {"checkpoint-1", "checkpoint-2", "log.jsonl", "loss_curve.png", "samples.png", "training_config.yaml"}
    monkeypatch.setattr(train_dit.SDTPipeline, "save_pretrained", full)
    line = refused(DIT, left=written)
    assert "No space left on device" in line
    assert line.endswith("checkpoint-2 is complete: continue with resume_from_checkpoint latest.")
    monkeypatch.undo()
    monkeypatch.setattr(validation, "plot_loss_curve", full)
    line = refused(DIT, "--resume_from_checkpoint", "latest", "--max_train_steps", "3", left=written)
    assert "loss_curve.png" in line
    assert "checkpoint-2 is complete" in line
    monkeypatch.undo()
    more = ("--output_dir", tmp_path / "out", "--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    assert call(DIT, *SMALL_DIT, *more).returncode == 0
