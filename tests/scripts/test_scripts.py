"""The scripts as a user runs them: in processes of their own, on small runs."""

import json
import os
import re
import signal
import sys
import time

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from sdt_diffusion.training.monitor import read_log
from tests.scripts.forks import Fork
from tests.scripts.process import assert_same_weights, call, fork, run

SMALL = [
    *("--cpu_threads", "1", "--model_overrides", '{"num_layers": 1, "dropout": 0.1}'),
    *("--train_batch_size", "8", "--gradient_accumulation_steps", "2", "--num_validation_images", "20"),
    *("--max_train_steps", "30", "--lr_warmup_steps", "5", "--checkpointing_steps", "6", "--logging_steps", "5"),
    *("--validation_steps", "10", "--num_inference_steps", "2", "--label_accuracy_samples", "0"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small undisturbed run on the digits, as `accelerate launch` starts it."""
    output_dir = tmp_path_factory.mktemp("run") / "digits"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "train/train_dit.py"]
    result = run(*launch, *SMALL, "--label_accuracy_samples", "20", "--output_dir", output_dir)
    return output_dir, result


def test_training_leaves_a_pipeline_pictures_a_log_and_its_config(trained):
    output_dir, result = trained
    for name in ("samples.png", "loss_curve.png", "samples/step-0000020.png"):
        assert np.array(Image.open(output_dir / name)).std() > 1
    assert [record["step"] for record in read_log(output_dir) if "loss" in record] == [5, 10, 15, 20, 25, 30]
    assert "learning_rate: 0.001" in (output_dir / "training_config.yaml").read_text()
    assert list((output_dir / "logs").rglob("*tfevents*"))
    accuracy = json.loads((output_dir / "results.json").read_text())["label_accuracy"]
    assert f"{accuracy:.1%} of 20 samples are classified as their label" in result.stdout
    assert "images/s" in result.stderr
    pipe = DiffusionPipeline.from_pretrained(output_dir)
    assert pipe(["7"], num_inference_steps=1).images[0].size == (8, 8)
    assert_same_weights(output_dir / "transformer", output_dir / "checkpoint-30" / "transformer_ema")
    assert list(output_dir.rglob("*partial*")) == []


@pytest.mark.parametrize(
    ("kill_at", "by"),
    [
        ("checkpoint-*.partial", signal.SIGKILL),
        ("checkpoint-6", signal.SIGTERM),
    ],
)
def test_a_killed_and_resumed_run_ends_with_the_same_weights(trained, tmp_path, kill_at, by):
    """In the steps after a checkpoint, or while one is being written; with its loader's worker, as clusters do it."""
    output_dir = tmp_path / "killed"
    command = ["train/train_dit.py", *SMALL, "--dataloader_num_workers", "1", "--output_dir", str(output_dir)]
    process = Fork(*command, start_new_session=True)
    while not list(output_dir.glob(kill_at)):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.0005)
    os.killpg(process.pid, by)
    out, err = process.communicate()
    assert not (output_dir / "model_index.json").exists()
    if by == signal.SIGTERM:
        assert process.returncode == 143
        step = int(re.search(r"Stopped by SIGTERM after step (\d+), which checkpoint-(\1) holds", out)[1])
        assert (output_dir / f"checkpoint-{step}" / "checkpoint.json").is_file()
        assert "Traceback" not in err

    fork(*command, "--resume_from_checkpoint", "latest")
    for name in ("transformer", "transformer_ema"):
        assert_same_weights(output_dir / "checkpoint-30" / name, trained[0] / "checkpoint-30" / name)
    assert_same_weights(output_dir / "transformer", trained[0] / "transformer")
    samples = [np.array(Image.open(folder / "samples.png")) for folder in (output_dir, trained[0])]
    assert np.array_equal(*samples)
    steps = [record["step"] for record in read_log(output_dir) if "loss" in record]
    assert steps == sorted(set(steps))
    assert steps[-1] == 30


def test_a_second_run_does_not_touch_the_first(trained):
    output_dir, _ = trained
    before = (output_dir / "training_config.yaml").read_text()
    again = call("train/train_dit.py", *SMALL, "--label_accuracy_samples", "20", "--output_dir", output_dir)
    assert "already holds this run. Continue it with resume_from_checkpoint latest" in again.stderr
    other = call("train/train_dit.py", *SMALL, "--output_dir", output_dir, "--learning_rate", "1")
    assert "another config: learning_rate: 0.001 there, 1.0 now" in other.stderr
    assert again.returncode == other.returncode == 1
    assert (output_dir / "training_config.yaml").read_text() == before


def test_a_run_that_diverges_stops_and_saves_no_pipeline(tmp_path):
    output_dir = tmp_path / "diverged"
    arguments = [*SMALL, "--validation_steps", "0", "--output_dir", output_dir]
    steep = ("--learning_rate", "1000", "--lr_warmup_steps", "0", "--max_grad_norm", "1e9")
    result = call("train/train_dit.py", *arguments, *steep, "--max_skipped_steps", "3")
    assert result.returncode == 1
    assert re.search(
        r"Error: The (loss|gradient norm) is (nan|inf) at step \d+, and 3 step\(s\) before it", result.stderr
    )
    assert not (output_dir / "model_index.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "SDT-XXL/2"], "Unknown preset 'SDT-XXL/2'"),
        (["--learning_rat", "1"], "unknown argument(s) --learning_rat"),
        (["--resolution", "9"], "sample_size 9x9 is not divisible by patch_size 2"),
        (["--dataset", "/nowhere"], "There is no file or folder /nowhere"),
        (["--resume_from_checkpoint", "checkpoint-7"], "There is no checkpoint checkpoint-7"),
        (["--num_validation_images", "-1"], "num_validation_images must be at least 0 and at most 10000, not -1"),
        (["--lr_scheduler", "steep"], "lr_scheduler must be one of linear, cosine,"),
        (["--model_overrides", '{"sample_size": [8, 16]}'], "sample_size follow from the data set and resolution"),
    ],
)
def test_bad_flags_stop_before_anything_is_written(tmp_path, argv, message):
    result = call("train/train_dit.py", "--output_dir", tmp_path / "out", *argv)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "objective", [["--objective", "flow"], ["--objective", "ddpm", "--prediction_type", "v_prediction"]]
)
def test_trains_in_the_latents_of_a_vae_on_a_folder_of_images(tmp_path, tiny_vae, objective):
    tiny_vae.save_pretrained(tmp_path / "vae")
    for i in range(12):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    output_dir = tmp_path / "out"
    call(
        "train/train_dit.py",
        *("--dataset", tmp_path / "images", "--resolution", "16", "--random_flip", "True"),
        *("--pretrained_vae_model_name_or_path", tmp_path / "vae", "--model", "SDT-S/2", "--qk_norm", "rms_norm"),
        *("--model_overrides", '{"num_layers": 1, "num_attention_heads": 2}', "--mixed_precision", "bf16"),
        *(
            "--max_train_steps",
            "3",
            "--train_batch_size",
            "4",
            "--gradient_checkpointing",
            "True",
            "--output_dir",
            output_dir,
        ),
        *("--num_validation_images", "3", "--num_inference_steps", "2", "--report_to", "none", *objective),
    )
    pipe = DiffusionPipeline.from_pretrained(output_dir)
    assert pipe.vae.config.scaling_factor == 0.5
    assert pipe(["class2"], num_inference_steps=2).images[0].size == (16, 16)
    assert pipe.transformer.config.num_classes == 3


class TestSampling:
    @pytest.fixture(scope="class")
    @classmethod
    def sampled(cls, trained, tmp_path_factory):
        output_dir = tmp_path_factory.mktemp("samples") / "a"
        argv = ("--classes", "3", "7", "--num_images", "10", "--num_inference_steps", "4", "--npz")
        result = fork("sample/sample.py", "--model", trained[0], *argv, "--output_dir", output_dir)
        return output_dir, result

    def test_leaves_a_file_per_sample_and_a_grid(self, sampled):
        output_dir, result = sampled
        names = [path.name for path in sorted((output_dir / "images").iterdir())]
        assert names[:3] == ["000000-class3.png", "000001-class7.png", "000002-class3.png"]
        assert len(names) == 10
        assert Image.open(output_dir / "images" / names[0]).size == (8, 8)
        assert np.array(Image.open(output_dir / "grid.png")).std() > 1
        first = np.array(Image.open(output_dir / "images" / names[0]))
        packed = np.load(output_dir / "samples.npz")["arr_0"]
        assert packed.shape == (10, 8, 8, 3)
        assert np.array_equal(packed[0], np.repeat(first[..., None], 3, axis=2))
        sampler = "FlowMatchEulerDiscreteScheduler, 4 steps, 8 network evaluations, guidance 1.5, seed 0"  # the run's
        assert sampler in result.stdout
        record = json.loads((output_dir / "samples.json").read_text())
        assert record["kind"] == "samples"
        assert record["sampler"] == sampler
        assert record["labels"] == [3, 7] * 5

    def test_another_batch_size_and_count_give_the_same_pictures(self, trained, sampled, tmp_path):
        argv = ("--classes", "3", "7", "--num_images", "5", "--num_inference_steps", "4", "--batch_size", "2")
        call("sample/sample.py", "--model", trained[0], *argv, "--output_dir", tmp_path / "b")
        for path in sorted((tmp_path / "b" / "images").iterdir()):
            first, second = (
                np.array(Image.open(folder / path.name)).astype(int) for folder in (sampled[0] / "images", path.parent)
            )
            assert np.abs(first - second).max() <= 1  # a rounding of 1e-6 may cross the edge of a gray level

    @pytest.mark.parametrize(
        ("argv", "message", "returncode"),
        [
            (["--classes", "10"], "Class label 10 is out of range: the model has labels 0..9", 1),
            (["--classes", "wolf"], "Unknown class name(s) 'wolf'", 1),
            (["--scheduler", "DDIMScheduler"], "'DDIMScheduler' is not a scheduler for this flow-matching model", 1),
            (["--samples_npz", "a.zip"], "a.zip must end in .npz", 1),
            (["--num_images", "0"], "must be at least 1", 2),
        ],
    )
    def test_bad_flags_are_refused(self, trained, tmp_path, argv, message, returncode):
        result = call("sample/sample.py", "--model", trained[0], "--output_dir", tmp_path / "c", *argv)
        assert result.returncode == returncode
        assert message in result.stderr.splitlines()[-1]
        assert not (tmp_path / "c").exists()

    def test_a_folder_with_files_is_left_alone(self, trained, sampled):
        result = call("sample/sample.py", "--model", trained[0], "--output_dir", sampled[0])
        assert "is not an empty folder" in result.stderr


def test_label_accuracy_script_reports_the_measure(trained):
    flags = ("--num_images", "20", "--num_inference_steps", "2")
    result = call("eval/label_accuracy.py", "--model", trained[0], *flags)
    report = json.loads(result.stdout)
    assert 0 <= report["label_accuracy"] <= 1
    assert report["sampler"].startswith("FlowMatchEulerDiscreteScheduler, 2 steps, 4 network evaluations")
