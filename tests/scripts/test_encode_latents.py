"""train/encode_latents.py as a user runs it, and killed."""

import signal
import time

import pytest
from datasets import ClassLabel

from sdt_diffusion.data import LatentCache
from tests.data.test_images import table
from tests.scripts.forks import Fork
from tests.scripts.process import fork_ranks, load_main

ENCODE = "train/encode_latents.py"


@pytest.fixture
def arguments(tiny_vae, tmp_path):
    """Arguments to encode pictures with a tiny VAE, one shard and batch an image."""
    tiny_vae.save_pretrained(tmp_path / "vae")
    table([i % 3 for i in range(60)], label=ClassLabel(names=["ant", "bee", "cat"])).to_parquet(tmp_path / "x.parquet")
    return [
        *("--pretrained_vae_model_name_or_path", str(tmp_path / "vae"), "--dataset", str(tmp_path / "x.parquet")),
        *("--resolution", "32", "--shard_size", "1", "--batch_size", "1"),
    ]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_run_repeats_one_shard_and_two_processes_write_the_same_files(arguments, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = fork_ranks(ENCODE, *arguments, "--output_dir", whole)
    assert f"60 images of 3 classes are in {whole}." in result.stdout
    assert len(LatentCache(whole)) == 60

    process = Fork(ENCODE, *arguments, "--output_dir", killed)
    while not list(killed.glob("shard-00002*")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in killed.glob("shard-*.safetensors")}
    assert 3 <= len(done) < 60

    load_main(ENCODE)([*arguments, "--output_dir", str(killed)])
    again = [path for path, time_written in done.items() if path.stat().st_mtime_ns != time_written]
    assert len(again) <= 1
    assert files(killed) == files(whole)


def test_checksums_are_verified_on_request(arguments, tmp_path, capsys):
    main = load_main("train/encode_latents.py")
    main([*arguments, "--output_dir", str(tmp_path / "cache")])
    main(["--output_dir", str(tmp_path / "cache"), "--verify", "True"])
    assert f"All 60 shards of {tmp_path / 'cache'} are as they were written." in capsys.readouterr().out
    path = tmp_path / "cache" / "shard-00041.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(SystemExit, match=r"1 of 60 shards are damaged: shard-00041.safetensors"):
        main(["--output_dir", str(tmp_path / "cache"), "--verify", "True"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dataset", "/nowhere/images"], "There is no file or folder /nowhere/images"),
        (["--resolution", "33"], "resolution 33 is not divisible by the VAE's factor 2"),
        (["--image_mode", "L"], r"The VAE takes 3 channel\(s\)"),
        (["--verify", "True"], "manifest.json is not a manifest of latents"),
        (["--pretrained_vae_model_name_or_path", "/nowhere/vae"], "/nowhere/vae"),
    ],
)
def test_bad_arguments_leave_nothing_behind(arguments, tmp_path, change, message):
    with pytest.raises(SystemExit, match=f"Error: .*{message}"):
        load_main("train/encode_latents.py")([*arguments, "--output_dir", str(tmp_path / "cache"), *change])
    assert not (tmp_path / "cache").exists()


def test_an_empty_folder_is_refused(arguments, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"Error: Cannot read the data set .*empty"):
        load_main("train/encode_latents.py")(
            [*arguments, "--output_dir", str(tmp_path / "cache"), "--dataset", str(tmp_path / "empty")]
        )
