"""sample.py and folders of samples that were interrupted, damaged, or belong to someone else."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

from sdt_diffusion.sampling import folder as folder_module
from sdt_diffusion.sampling.folder import SampleFolder, sample_into
from sdt_diffusion.sampling.sample import SampleArguments, main
from sdt_diffusion.sampling.settings import SamplingArguments
from sdt_diffusion.utils.files import FolderLock

SAMPLING = {"seed": 7, "guidance_scale": 1.5, "num_inference_steps": 1}


@pytest.fixture
def model(make_pipe, tmp_path):
    make_pipe(guidance_scale=1.5, num_inference_steps=2).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def command(model, tmp_path):
    flags = ["--model", model, "--num_images", "6", "--batch_size", "2", "--output_dir", str(tmp_path / "out")]
    return [*flags, "--npz"]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestSample:
    @pytest.fixture
    def stopped(self, command, tmp_path, monkeypatch, capsys):
        """A folder that Ctrl-C has left after the first of three batches, and what was printed."""
        write = folder_module._write_batch

        def write_one(path, batch):
            if path.name == "batch-000001.npy":
                raise KeyboardInterrupt
            write(path, batch)

        with monkeypatch.context() as patch:
            patch.setattr(folder_module, "_write_batch", write_one)
            with pytest.raises(SystemExit) as stop:
                main(command)
        assert stop.value.code == 130
        assert capsys.readouterr().err.splitlines()[-1] == "Stopped by Ctrl-C."
        return tmp_path / "out"

    def test_the_same_command_goes_on_and_leaves_what_an_undisturbed_one_does(self, command, stopped, tmp_path):
        assert sorted(contents(stopped)) == [
            f"batches/{n}" for n in ("batch-000000.npy", "batch-000000.sha256", "manifest.json")
        ]
        whole = [flag.replace("/out", "/whole") for flag in command]
        main(command)
        main(whole)
        assert contents(stopped) == contents(tmp_path / "whole")
        assert sorted(path.name for path in stopped.iterdir()) == ["grid.png", "images", "samples.json", "samples.npz"]

    def test_a_complete_folder_is_left_as_it_is(self, command, tmp_path, capsys):
        main(command)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
        main(command)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")} == before
        assert "Saved 6 images" in capsys.readouterr().out

    def test_another_command_is_refused(self, command, stopped):
        with pytest.raises(SystemExit, match=r"holds samples made with other settings .*seed: 0 there, 1 now"):
            main([*command, "--seed", "1"])
        main(command)
        with pytest.raises(SystemExit, match=r"not an empty folder: it holds other samples .*seed: 0 there, 1 now"):
            main([*command, "--seed", "1"])

    def test_another_model_of_the_same_name_is_refused(self, command, make_pipe, make_model, model, tmp_path):
        main(command)
        other = make_model()
        with torch.no_grad():
            other.proj_out_2.bias.add_(1)
        make_pipe(transformer=other, guidance_scale=1.5, num_inference_steps=2).save_pretrained(model)
        with pytest.raises(SystemExit, match=r"it holds other samples .weights: "):
            main(command)

    def test_samples_that_are_nan_are_refused_before_there_are_pictures(self, command, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "sdt_diffusion.sdt.pipeline_sdt.SDTPipeline.predict", lambda self, latents, *_: latents * math.nan
        )
        with pytest.raises(SystemExit, match=r"^Error: Sample 0 \(class 0, seed 0\) is not finite"):
            main(command)
        assert list(contents(tmp_path / "out")) == ["batches/manifest.json"]

    def test_a_second_process_is_kept_out(self, command, stopped, monkeypatch):
        def locked(self):
            raise ValueError(f"Another process is writing to {self.folder}")

        monkeypatch.setattr(FolderLock, "acquire", locked)
        with pytest.raises(SystemExit, match="Another process is writing to"):
            main(command)

    def test_what_cannot_be_written_is_known_before_the_model_is_loaded(self, command, tmp_path):
        (tmp_path / "file").write_text("precious")
        flags = ["--model", "./no", "--output_dir", str(tmp_path / "file" / "out")]
        with pytest.raises(SystemExit, match=r"^Error: .*No file can be written there"):
            main(flags)
        assert (tmp_path / "file").read_text() == "precious"

    def test_a_disk_that_is_too_small_is_known_before_sampling(self, command, tmp_path, monkeypatch):
        full = shutil._ntuple_diskusage(10, 10, 0)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(SystemExit, match=r"^Error: .*The samples will take about .* GB, and 0 GB are free"):
            main(command)
        assert not contents(tmp_path / "out")

    def test_a_cut_record_is_named(self, command, tmp_path):
        main(command)
        (tmp_path / "out" / "samples.json").write_bytes(b"{")
        with pytest.raises(SystemExit, match=r"samples.json is damaged: it is not valid JSON"):
            main(command)


class TestFolder:
    @pytest.fixture
    def made(self, make_pipe, tmp_path):
        pipe = make_pipe()

        def make():
            return sample_into(tmp_path / "samples", pipe, [0, 1, 2, 3, 4, 0], SAMPLING, 2, progress=False)

        make()
        return make, tmp_path / "samples"

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.unlink(),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            lambda path: path.write_bytes(bytes(len(path.read_bytes()))),
            lambda path: np.save(path, np.full((2, 8, 8, 3), np.nan)),
            lambda path: np.save(path, np.load(path)[:, :4]),
            lambda path: np.save(path, np.load(path).astype(np.int64)),
            lambda path: np.save(path, np.array([None]), allow_pickle=True),
            lambda path: (path.unlink(), os.mkfifo(path)),
            lambda path: (path.unlink(), path.symlink_to(path)),
        ],
    )
    @pytest.mark.parametrize("with_checksums", [True, False])
    def test_a_damaged_batch_is_refused_and_drawn_again(self, made, damage, with_checksums):
        make, folder = made
        path = folder / "batch-000001.npy"
        whole = path.read_bytes()
        damage(path)
        if not with_checksums:
            for digest in folder.glob("*.sha256"):
                digest.unlink()
        with pytest.raises(ValueError, match=r"1 of its files are missing or damaged, such as batch-000001\.npy"):
            SampleFolder(folder)
        make()
        assert path.read_bytes() == whole

    def test_a_flipped_bit_is_noticed(self, made):
        make, folder = made
        path = folder / "batch-000001.npy"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"missing or damaged, such as batch-000001\.npy"):
            SampleFolder(folder)
        make()
        assert path.read_bytes() == whole

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\xff\xfe",
            b"[]",
            b'{"num_samples": "many", "batch_size": 1, "class_labels": []}',
            b'{"num_samples": 1e9, "batch_size": 1, "class_labels": []}',
            b'{"num_samples": 1, "batch_size": 0, "class_labels": [0]}',
            b'{"num_samples": 9, "batch_size": 1, "class_labels": [0]}',
            b'{"num_samples": 1, "batch_size": 1, "class_labels": 0}',
        ],
    )
    def test_a_damaged_manifest_is_named(self, made, content):
        make, folder = made
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            SampleFolder(folder)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            make()

    def test_folders_made_before_there_were_checksums_load(self, made):
        make, folder = made
        for digest in folder.glob("*.sha256"):
            digest.unlink()
        before = contents(folder)
        make()
        assert contents(folder) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_inference_steps", value) for value in (0, -1, 10**8, 2.5)),
        *(("guidance_scale", value) for value in (math.nan, math.inf, -1.0, 1e30)),
        *(("batch_size", value) for value in (0, -1, 10**9)),
        *(("seed", value) for value in (-1, 2**70)),
        ("dtype", "float8"),
    ],
)
def test_numbers_that_nobody_means_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} (must be|is too large)"):
        SamplingArguments(model="m", **{name: value})


@pytest.mark.parametrize("value", [0, -1, 10**9])
def test_a_number_of_images_that_nobody_means_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"^num_images must be "):
        SampleArguments(output_dir=tmp_path, num_images=value)


def test_steps_beyond_the_schedule_are_refused_before_sampling(make_pipe, tmp_path):
    import diffusers

    make_pipe(diffusers.DDIMScheduler(num_train_timesteps=10), num_inference_steps=5).save_pretrained(tmp_path / "m")
    flags = ["--model", str(tmp_path / "m"), "--output_dir", str(tmp_path / "out"), "--num_inference_steps", "11"]
    with pytest.raises(SystemExit, match="num_inference_steps must be at least 1 and at most 10, not 11"):
        main(flags)
    assert not (tmp_path / "out").exists()


def test_records_are_valid_json(command, tmp_path):
    main(command)

    def refuse(name):
        raise AssertionError(name)

    json.loads((tmp_path / "out" / "samples.json").read_text(), parse_constant=refuse)
