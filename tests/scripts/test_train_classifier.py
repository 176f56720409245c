"""The classifier's script as a user runs it: in processes of its own, on small runs."""

import json
import signal
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from sdt_diffusion.classification import SDTForImageClassification
from sdt_diffusion.data import DataArguments
from sdt_diffusion.data.splits import ValidationDataArguments, load_splits
from sdt_diffusion.metrics.confusion import from_log
from sdt_diffusion.training.monitor import read_log
from sdt_diffusion.training.train_classifier import evaluate_classifier
from tests.scripts.forks import Fork
from tests.scripts.process import assert_same_weights, fork, fork_ranks, load_main, run

TRAIN = "train/train_classifier.py"
# Everything random at once: what a kill must not change.
SMALL = [
    *("--model_overrides", '{"depths": [1, 1], "dropout": 0.1}', "--drop_path", "0.2", "--random_flip", "True"),
    *("--aa", "rand-m9-mstd0.5-inc1", "--mixup", "0.8", "--cutmix", "1.0", "--mixup_mode", "elem", "--reprob", "0.25"),
    *("--aug_repeats", "3", "--layer_decay", "0.8", "--min_lr", "1e-5", "--train_batch_size", "8"),
    *("--gradient_accumulation_steps", "2", "--max_train_steps", "20", "--lr_warmup_steps", "5"),
    *("--checkpointing_steps", "6", "--logging_steps", "5", "--validation_steps", "10", "--report_to", "none"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small undisturbed run on the digits, as `accelerate launch` starts it."""
    output_dir = tmp_path_factory.mktemp("run") / "digits"
    launch = [sys.executable, "-m", "accelerate.commands.launch", TRAIN]
    return output_dir, run(*launch, *SMALL, "--output_dir", output_dir)


def test_training_leaves_a_classifier_for_pipelines_a_log_results_and_a_curve(trained):
    output_dir, result = trained
    records = read_log(output_dir)
    assert [record["step"] for record in records if "test_accuracy" in record] == [0, 10, 20]
    results = json.loads((output_dir / "results.json").read_text())
    assert (results["kind"], results["train_images"], results["count"]) == ("classifier_training", 1438, 359)
    last = records[-1]
    assert (results["top1"], results["top5"]) == (last["test_accuracy"], last["test_accuracy_top5"])
    assert f"{results['top1']:.2%} of 359 test images are classified right" in result.stdout
    assert np.array(Image.open(output_dir / "accuracy_curve.png")).std() > 1
    assert f"| top-1 accuracy | {results['top1']:.2%} | 359 |" in (output_dir / "README.md").read_text()
    assert list(output_dir.rglob("*partial*")) == []
    assert_same_weights(output_dir, output_dir / "checkpoint-20" / "classifier_ema")
    code = (
        "import sdt_diffusion.classification\n"
        "from PIL import Image\n"
        "from transformers import pipeline\n"
        f"classify = pipeline('image-classification', model=r'{output_dir}', top_k=10)\n"
        "print(*sorted(result['label'] for result in classify(Image.new('RGB', (9, 8)))))\n"
    )
    assert run(sys.executable, "-c", code).stdout.split() == [str(digit) for digit in range(10)]


def test_a_killed_and_resumed_run_ends_with_the_same_weights(trained, tmp_path):
    """SIGKILL in the steps after a checkpoint; the second run loads its images in a process of their own."""
    output_dir = tmp_path / "killed"
    command = [TRAIN, *SMALL, "--output_dir", str(output_dir)]
    process = Fork(*command)
    while not (output_dir / "checkpoint-6").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (output_dir / "config.json").exists()

    fork(*command, "--resume_from_checkpoint", "latest", "--dataloader_num_workers", "1")
    for name in ("classifier", "classifier_ema"):
        assert_same_weights(output_dir / "checkpoint-20" / name, trained[0] / "checkpoint-20" / name)
    assert_same_weights(output_dir, trained[0])
    assert (output_dir / "results.json").read_text() == (trained[0] / "results.json").read_text()
    tests = [
        [(record["step"], from_log(record)) for record in read_log(folder) if "test_accuracy" in record]
        for folder in (output_dir, trained[0])
    ]
    assert tests[0] == tests[1]


def test_two_processes_share_a_step_and_the_test_images(tmp_path):
    flags = ("--num_train_epochs", "0.1", "--train_batch_size", "16", "--report_to", "none", "--ema_decay", "0.5")
    result = fork_ranks(TRAIN, *flags, "--lr_warmup_steps", "0", "--output_dir", tmp_path)
    assert result.stdout.count("Saved the classifier") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["step"], results["count"]) == (5, 359)  # a tenth of 1,438 in steps of 2 x 16
    # What was tested, by both processes, is what one of them saved: batch norms saw other images in each.
    _, _, test_images = load_splits(DataArguments(resolution=8, image_mode="L"), ValidationDataArguments(), 8)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    again = evaluate_classifier(model, test_images, processor, Accelerator(cpu=True), batch_size=64)
    assert again["loss"] == pytest.approx(results["loss"], rel=1e-6)
    assert again["top5"] == results["top5"]


@pytest.fixture
def main():
    script = load_main("train/train_classifier.py")

    def call(*argv):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        script([str(word) for word in argv])

    return call


@pytest.fixture
def folders(tmp_path):
    """Six color pictures in three class folders, to train and to test on."""
    for split in ("train", "val"):
        for i in range(6):
            path = tmp_path / "images" / split / ("ant", "bee", "cat")[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def folder_flags(folders, output_dir, *more):
    return [
        *("--dataset", folders, "--validation_split", "validation", "--output_dir", output_dir),
        *("--resolution", "32", "--max_train_steps", "2", "--train_batch_size", "4", "--report_to", "none"),
        *("--cpu_threads", "1", *more),
    ]


TINY = json.dumps(
    {"hidden_sizes": [16, 16, 16, 16], "depths": [1] * 4, "num_attention_heads": [2] * 4, "head_hidden_size": 8}
)


def test_the_imagenet_recipe_on_a_folder_with_a_validation_split(main, folders, tmp_path):
    output_dir = tmp_path / "out"
    config = ("--config", "train/configs/imagenet_classifier.yaml", "--model_overrides", TINY)
    flags = folder_flags(folders, output_dir, *config, "--num_train_epochs", "3", "--dataloader_num_workers", "0")
    main(*flags, "--mixed_precision", "bf16", "--gradient_checkpointing", "True")
    results = json.loads((output_dir / "results.json").read_text())
    assert (results["step"], results["train_images"], results["count"]) == (5, 6, 6)  # 3 epochs of 6 in 4s
    config = json.loads((output_dir / "config.json").read_text())
    assert config["id2label"] == {"0": "ant", "1": "bee", "2": "cat"}
    processor = json.loads((output_dir / "preprocessor_config.json").read_text())
    assert processor["size"]["shortest_edge"] == 37  # 32 / 0.875

    again = tmp_path / "again"
    (folders / "train" / "cat").rename(tmp_path / "no cats")
    (folders / "val" / "cat").rename(tmp_path / "no cats to test on")
    flags = folder_flags(folders, again, "--model", output_dir, "--drop_path", "0.3")
    with pytest.raises(SystemExit, match=r"has 3 labels, the data set 2 classes.*reinitialise_head"):
        main(*flags)
    edited = {"image_mean": [0.1, 0.2, 0.3], "crop_size": {"height": 24, "width": 24}}
    (output_dir / "preprocessor_config.json").write_text(json.dumps({**processor, **edited}))
    at = flags.index("--resolution")
    main(*flags[:at], *flags[at + 2 :], "--reinitialise_head", "True")
    assert json.loads((again / "preprocessor_config.json").read_text()) == {**processor, **edited}
    config = json.loads((again / "config.json").read_text())
    assert config["id2label"] == {"0": "ant", "1": "bee"}
    assert (config["hidden_sizes"], config["drop_path_rate"]) == ([16] * 4, 0.3)


@pytest.mark.parametrize("finetune", ["False", "True"])
def test_a_head_on_a_pipeline_of_the_digits(main, make_pipe, make_model, tmp_path, finetune):
    transformer = make_model(in_channels=1)
    make_pipe(transformer=transformer).save_pretrained(tmp_path / "pipe")
    output_dir = tmp_path / "out"
    flags = ("--config", "train/configs/digits_probe.yaml", "--model", tmp_path / "pipe", "--finetune", finetune)
    more = ("--max_train_steps", "3", "--train_batch_size", "16", "--layer_decay", "0.5", "--report_to", "none")
    main(*flags, *more, "--output_dir", output_dir)
    model = AutoModelForImageClassification.from_pretrained(output_dir)
    assert isinstance(model, SDTForImageClassification)
    assert model.config.id2label[7] == "7"
    trained = transformer.transformer_blocks[0].attn.to_q.weight
    assert torch.equal(model.transformer.transformer_blocks[0].attn.to_q.weight, trained) == (finetune == "False")
    results = json.loads((output_dir / "results.json").read_text())
    assert (results["trained_parameters"] == 32 * 10 + 10) == (finetune == "False")
    with pytest.raises(SystemExit, match="takes L images: set image_mode to L"):
        main(*flags, "--image_mode", "RGB", "--output_dir", tmp_path / "other")


def test_bad_data_is_named_before_training(main, folders, tmp_path):
    output_dir = tmp_path / "out"

    def refused(message):
        with pytest.raises(SystemExit, match=message):
            main(*folder_flags(folders, output_dir, "--model_overrides", TINY))
        assert not output_dir.exists()

    (folders / "train" / "dog").mkdir()
    refused(r"1 class folder\(s\) without an image: '.*train/dog'\. Fill or remove them")
    (folders / "train" / "dog").rmdir()
    (folders / "val" / "bee").rename(folders / "val" / "wasp")
    refused(r"images \(split 'train'\) has no image of the class\(es\) 'wasp'")
    (folders / "val" / "wasp").rename(folders / "val" / "bee")
    path = folders / "val" / "cat" / "5.png"
    path.write_bytes(path.read_bytes()[:80])
    refused(r"Cannot read the image of row \d \(.*cat/5\.png\) of")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "SDT-H-XXL"], "model 'SDT-H-XXL' is neither a preset (SDT-H-T, "),
        (["--mixup", "1", "--train_batch_size", "7"], "train_batch_size must be even for mixup and cutmix, not 7"),
        (["--aa", "rand-q9"], "aa 'rand-q9' is not an automatic augmentation of timm"),
        (["--aa", "much"], "aa 'much' is not an automatic augmentation of timm"),
        (["--probe_block", "1"], "probe_block does not apply to model SDT-H-digits, which is a preset"),
        (["--model_overrides", '{"num_labels": 3}'], "num_labels follow from the data set"),
        (["--validation_split", "test"], "name the images of digits that are trained on"),
        (["--scale", "0.5"], "scale takes the least and the largest value"),
        (["--smoothing", "1.5"], "smoothing must be at least 0 and at most 1, not 1.5"),
    ],
)
def test_bad_flags_stop_before_anything_is_written(main, capsys, tmp_path, argv, message):
    with pytest.raises(SystemExit) as error:
        main("--output_dir", tmp_path / "out", *argv)
    assert message in f"{capsys.readouterr().err}{error.value}"
    assert not (tmp_path / "out").exists()
