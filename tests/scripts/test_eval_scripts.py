"""The evaluation scripts as a user runs them: in processes of their own."""

import json
import signal
import time

import numpy as np
import pytest
from PIL import Image

from tests.scripts.forks import Fork
from tests.scripts.process import call, fork, fork_ranks


@pytest.fixture
def model(make_pipe, make_model, tmp_path):
    pipe = make_pipe(transformer=make_model(in_channels=1), guidance_scale=1.5)
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def flags(model, output, *more):
    return [
        *("--model", model, "--num_samples", "90", "--num_inference_steps", "3", "--batch_size", "16"),
        *("--reference", "digits", "--extractor", "pixels", "--kid_subset_size", "80", "--output", output),
        *more,
    ]


def test_number_of_processes_and_workers_change_no_digit(model, tmp_path):
    first = fork("eval/fid.py", *flags(model, tmp_path / "one.json"))
    assert "FD(pixels)-90" in first.stdout
    assert "3 steps, 6 network evaluations, guidance 1.5, seed 0" in first.stdout
    result = fork_ranks("eval/fid.py", *flags(model, tmp_path / "two.json", "--dataloader_num_workers", "1"))
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one.pop("samples") == {**two.pop("samples"), "images": ".../one.samples"}
    assert one == two
    assert result.stdout.count("FD(pixels)") == 1


def test_a_killed_run_resumes_where_it_stopped(model, tmp_path):
    fork("eval/fid.py", *flags(model, tmp_path / "whole.json", "--metrics", "fid"))
    output = tmp_path / "killed.json"
    command = ["eval/fid.py", *flags(model, output, "--metrics", "fid")]
    process = Fork(*command)
    samples = tmp_path / "killed.samples"
    while not list(samples.glob("batch-*.npy")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    kept = {path: path.stat().st_mtime_ns for path in samples.glob("batch-*.npy")}
    fork(*command)
    assert all(path.stat().st_mtime_ns == modified for path, modified in kept.items())
    assert json.loads(output.read_text())["fid"] == json.loads((tmp_path / "whole.json").read_text())["fid"]


def test_a_reference_made_beforehand_gives_the_same_numbers(model, tmp_path):
    reference = tmp_path / "references" / "digits.safetensors"
    result = call("eval/make_reference.py", "--images", "digits", "--extractor", "pixels", "--output", reference)
    assert "Statistics of 1797 images written to" in result.stdout
    assert [path.name for path in reference.parent.iterdir()] == ["digits.safetensors"]
    call("eval/fid.py", *flags(model, tmp_path / "a.json"))
    again = flags(model, tmp_path / "b.json", "--reference", reference, "--samples_dir", tmp_path / "a.samples")
    call("eval/fid.py", *again)
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    for name in ("fid", "precision", "recall", "kid", "kid_std"):
        assert first[name] == second[name]


def test_errors_are_one_line(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "a.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "b.png")
    output = tmp_path / "fid.json"
    for arguments, message in [
        (
            ("--extractor", "pixels", "--metrics", "fid"),
            f"Error: Cannot use {folder / 'b.png'}: its mode is L,",
        ),
        (
            ("--extractor", "inception", "--extractor_weights", "no.pth"),
            "Error: extractor_weights: there is no file",
        ),
    ]:
        flags = ["--samples", folder, "--reference", folder, "--output", output, *arguments]
        result = call("eval/fid.py", *flags)
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith(message)
        assert "Traceback" not in result.stderr
        assert not output.exists()
