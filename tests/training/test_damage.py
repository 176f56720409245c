"""Damage to files that training reads: it is noticed before anything is loaded, and named in one line."""

import json
import logging
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdt_diffusion.training.checkpoint import (
    find_checkpoint,
    find_damage,
    find_shared_checkpoint,
    list_checkpoints,
    read_changes,
    read_manifest,
    save_checkpoint,
    write_config,
)
from sdt_diffusion.training.monitor import NonFiniteLossError, TrainingLog, read_log
from tests.training.helpers import build_run, trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints after two and four steps."""
    return trained(build_run(tmp_path_factory.mktemp("damage") / "out", max_train_steps=4)).output_dir


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of its folder, to be damaged."""
    return shutil.copytree(finished, tmp_path / "out")


def resume(folder, checkpoint="latest", **run):
    return build_run(folder, max_train_steps=4, resume_from_checkpoint=checkpoint, **run)


def flip_bit(path, position):
    with path.open("r+b") as file:
        file.seek(position // 8)
        byte = file.read(1)[0]
        file.seek(position // 8)
        file.write(bytes([byte ^ 1 << position % 8]))


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def make_fifo(path):
    os.mkfifo(path)


def link_to_itself(path):
    path.symlink_to(path)


#: Ways to damage a text file, each a function of its path, where there is none.
DAMAGES = {
    "zeros": lambda path: path.write_bytes(bytes(100)),
    "random": lambda path: path.write_bytes(random.Random(0).randbytes(100)),
    "a number": lambda path: path.write_text("7\n"),
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "deep": lambda path: path.write_text("[" * 100_000 + "\n"),
    "folder": lambda path: path.mkdir(),
    "pipe": make_fifo,
    "link": link_to_itself,
}


class TestFlippedBits:
    def test_each_byte_of_each_file_is_watched(self, tmp_path):
        """Of a checkpoint with small files, the manifest included."""

        def save(folder):
            (folder / "model").mkdir()
            (folder / "model" / "weights").write_bytes(b"\x00\x01weights")
            (folder / "optimizer").write_bytes(b"moments")

        checkpoint = save_checkpoint(
            tmp_path, 1, save, config={"learning_rate": 1e-05, "name": "é"}, state={"guard": {"skipped": 0}}
        )
        generator = random.Random(0)
        assert find_damage(checkpoint, contents=True) is None
        for path in files_of(checkpoint):
            for byte in range(path.stat().st_size):
                position = 8 * byte + generator.randrange(8)
                flip_bit(path, position)
                assert find_damage(checkpoint, contents=True), f"{path.name}, bit {position}"
                flip_bit(path, position)
        assert find_damage(checkpoint, contents=True) is None

    def test_latest_falls_back_and_a_path_is_refused(self, folder, caplog):
        generator, newest = random.Random(0), folder / "checkpoint-4"
        files = files_of(newest)
        assert len(files) == 8
        for path in files:
            for _ in range(8):
                position = generator.randrange(8 * path.stat().st_size)
                flip_bit(path, position)
                caplog.clear()
                with caplog.at_level(logging.WARNING):
                    assert find_checkpoint(folder, "latest").name == "checkpoint-2"
                assert path.name in caplog.text
                assert "checkpoint-4: it is incomplete or damaged" in caplog.text
                with pytest.raises(ValueError, match=rf"checkpoint-4 is incomplete or damaged: .*{path.name}"):
                    find_checkpoint(folder, "checkpoint-4")
                flip_bit(path, position)
        assert find_checkpoint(folder, "latest") == newest

    def test_a_run_goes_on_from_the_checkpoint_before(self, folder, finished):
        flip_bit(folder / "checkpoint-4" / "optimizer.safetensors", 80_001)
        with pytest.raises(ValueError, match=r"checkpoint-4 is incomplete or damaged: optimizer\.safetensors changed"):
            resume(folder, "checkpoint-4")
        run = resume(folder)
        assert run.step == 2
        trained(run)
        for path in (finished / "checkpoint-4").rglob("*.safetensors"):
            assert path.read_bytes() == (folder / path.relative_to(finished)).read_bytes()

    def test_listing_and_pruning_read_no_contents(self, folder):
        flip_bit(folder / "checkpoint-4" / "optimizer.safetensors", 80_001)
        assert find_damage(folder / "checkpoint-4") is None

    def test_the_main_process_reads_for_all(self, folder, monkeypatch):
        monkeypatch.setattr("sdt_diffusion.training.checkpoint.find_checkpoint", None)
        answers = iter([[folder / "checkpoint-4", None], [None, "it is damaged"]])
        monkeypatch.setattr("sdt_diffusion.training.checkpoint.broadcast_object_list", lambda nothing: next(answers))
        assert find_shared_checkpoint(folder, "latest", is_main_process=False) == folder / "checkpoint-4"
        with pytest.raises(ValueError, match="it is damaged"):
            find_shared_checkpoint(folder, "latest", is_main_process=False)


def as_earlier(checkpoint, change=lambda manifest: None):
    """Give a checkpoint the manifest of earlier versions, with sizes instead of checksums."""
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    manifest.pop("sha256")
    files = files_of(checkpoint)
    manifest["files"] = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    del manifest["files"]["checkpoint.json"]
    change(manifest)
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest, indent=2))


class TestManifests:
    def test_one_of_an_earlier_version_is_resumed_from(self, folder, finished):
        as_earlier(folder / "checkpoint-2")
        shutil.rmtree(folder / "checkpoint-4")
        run = trained(resume(folder))
        expected = load_file(finished / "checkpoint-4" / "optimizer.safetensors")
        found = load_file(run.output_dir / "checkpoint-4" / "optimizer.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_one_is_passed_over(self, folder, damage):
        path = folder / "checkpoint-4" / "checkpoint.json"
        path.unlink()
        DAMAGES[damage](path)
        assert "checkpoint.json" in find_damage(folder / "checkpoint-4")
        assert find_checkpoint(folder, "latest").name == "checkpoint-2"

    @pytest.mark.parametrize(
        "change",
        [
            lambda manifest: manifest.update(step="4"),
            lambda manifest: manifest.update(step=-4),
            lambda manifest: manifest.update(config=[]),
            lambda manifest: manifest.update(files={"optimizer.safetensors": "many"}),
            lambda manifest: manifest.update(files={"/dev/zero": 0}),
            lambda manifest: manifest.update(files={"../../file": 0}),
            lambda manifest: manifest.pop("state"),
            lambda manifest: manifest.update(sha356="0"),
            lambda manifest: manifest.update(config=json.loads('{"a": ' * 900 + "1" + "}" * 900)),
        ],
    )
    def test_one_with_other_entries_is_refused(self, folder, change):
        as_earlier(folder / "checkpoint-4", change)
        with pytest.raises(ValueError, match=r"checkpoint\.json is damaged"):
            read_manifest(folder / "checkpoint-4")

    @pytest.mark.parametrize("state", [{}, {"guard": 3}, {"guard": {"skipped": "a", "skipped_in_a_row": 0}}])
    def test_a_state_that_does_not_fit_is_refused(self, folder, state):
        as_earlier(folder / "checkpoint-4", lambda manifest: manifest.update(state=state))
        with pytest.raises(ValueError, match=r"checkpoint\.json is damaged: its state does not fit"):
            resume(folder)

    def test_names_that_only_look_like_checkpoints_are_passed_over(self, tmp_path):
        for name in ("checkpoint-²", "checkpoint-", "checkpoint-1.partial", "checkpoint--1"):
            (tmp_path / name).mkdir()
        assert list_checkpoints(tmp_path) == []


class TestTensors:
    """In checkpoints of earlier versions, which have no checksums, or whose checksums were made after the damage."""

    @staticmethod
    def rewrite(path, change):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors: tensors.pop("proj_out_2.bias.step"), "it lacks proj_out_2.bias.step"),
            (lambda tensors: tensors.pop("proj_out_2.bias.exp_avg"), "it lacks proj_out_2.bias.exp_avg"),
            (lambda tensors: tensors.update(more=torch.zeros(1)), "it has more"),
            (
                lambda tensors: tensors.update({"proj_out_2.bias.exp_avg_sq": torch.zeros(1)}),
                r"proj_out_2.bias.exp_avg_sq is torch.float32 of shape \(1,\)",
            ),
            (
                lambda tensors: tensors.update({"proj_out_2.bias.step": torch.tensor(2)}),
                "proj_out_2.bias.step is torch.int64",
            ),
            (lambda tensors: tensors["proj_out_2.bias.exp_avg"].fill_(torch.nan), "has values that are NaN"),
        ],
    )
    def test_moments_must_be_those_of_the_run(self, folder, change, message):
        self.rewrite(folder / "checkpoint-4" / "optimizer.safetensors", change)
        as_earlier(folder / "checkpoint-4")
        with pytest.raises(ValueError, match=rf"optimizer\.safetensors .*{message}"):
            resume(folder)

    @pytest.mark.parametrize("name", ["transformer", "transformer_ema"])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors: tensors.pop("proj_out_2.bias"), "it lacks proj_out_2.bias"),
            (lambda tensors: tensors.update(more=torch.zeros(1)), "it has more"),
            (
                lambda tensors: tensors.update({"proj_out_2.bias": tensors["proj_out_2.bias"].to(torch.int8)}),
                "proj_out_2.bias is torch.int8",
            ),
            (lambda tensors: tensors["proj_out_2.bias"].fill_(torch.inf), "has values that are NaN or infinite"),
        ],
    )
    def test_weights_and_averages_must_be_those_of_the_run(self, folder, name, change, message):
        self.rewrite(folder / "checkpoint-4" / name / "diffusion_pytorch_model.safetensors", change)
        as_earlier(folder / "checkpoint-4")
        with pytest.raises(ValueError, match=rf"{name} .*{message}"):
            resume(folder)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"num_layers": "many"}', '{"num_layers": -1}'])
    def test_a_model_config_that_is_none_is_refused(self, folder, content):
        (folder / "checkpoint-4" / "transformer" / "config.json").write_text(content)
        as_earlier(folder / "checkpoint-4")
        with pytest.raises(ValueError, match=r"config\.json|transformer is another model"):
            resume(folder)

    def test_a_folder_without_weights_is_refused(self, folder):
        (folder / "checkpoint-4" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        as_earlier(folder / "checkpoint-4")
        with pytest.raises(ValueError, match=r"transformer does not fit: it lacks .* and \d+ more"):
            resume(folder)

    def test_a_file_that_was_put_beside_the_weights_is_refused(self, folder):
        weights = folder / "checkpoint-4" / "transformer" / "diffusion_pytorch_model.safetensors"
        shutil.copy(weights, weights.with_name("more.safetensors"))
        with pytest.raises(ValueError, match=r"more\.safetensors does not belong there: another file has .* more too"):
            resume(folder)


class TestOnlyFiniteTensorsAreSaved:
    @pytest.mark.parametrize("what", ["weights", "average", "moments"])
    def test_the_last_checkpoint_stays(self, folder, what):
        run = resume(folder, checkpoints_total_limit=1)
        tensors = {
            "weights": run.unwrapped_model.proj_out_2.bias.data,
            "average": run.averages["ema"].tensors["proj_out_2.bias"],
            "moments": run.optimizer.state[run.unwrapped_model.proj_out_2.bias]["exp_avg_sq"],
        }
        tensors[what][1] = torch.nan
        run.step = 5
        message = (
            r"checkpoint-5 was not written: proj_out_2\.bias.* has values that are NaN .* checkpoint-4 is complete"
        )
        with pytest.raises(NonFiniteLossError, match=message):
            run.save_checkpoint()
        assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
        assert not list(folder.glob("*.partial"))

    def test_a_huge_learning_rate_leaves_only_finite_checkpoints(self, tmp_path):
        run = build_run(
            tmp_path / "out", optimization={"learning_rate": 1000}, max_train_steps=80, max_skipped_steps=5
        )
        with pytest.raises(ValueError, match="no checkpoint holds values that are not finite"):
            trained(run)
        for path in (tmp_path / "out").rglob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(path).values())

    def test_moments_of_what_never_had_a_gradient_are_saved_as_zeros(self, tmp_path):
        run = build_run(tmp_path / "out")
        run.state.save(tmp_path)
        run.state.load(tmp_path)
        state = run.optimizer.state[run.unwrapped_model.proj_out_2.bias]
        assert all((state[key] == 0).all() for key in ("step", "exp_avg", "exp_avg_sq"))


class TestTheConfig:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_one_is_named_before_anything_is_done(self, folder, damage):
        path = folder / "training_config.yaml"
        path.unlink()
        DAMAGES[damage](path)
        with pytest.raises(ValueError, match=r"training_config\.yaml.* or give another output_dir"):
            resume(folder)

    @pytest.mark.parametrize("changes", ["3", "[3]", "{step: 3}", "[{argument: seed}]", "[{step: last}]"])
    def test_changes_of_another_form_are_named(self, folder, changes):
        path = folder / "training_config.yaml"
        path.write_text(path.read_text() + f"changes: {changes}\n")
        with pytest.raises(ValueError, match=r"training_config\.yaml is damaged: each of its changes"):
            resume(folder)

    def test_lists_that_occur_twice_are_written_out(self, tmp_path):
        both = [1, 2]
        write_config(tmp_path, {"a": both, "b": both}, [{"step": 1, "argument": "a", "before": both, "after": both}])
        assert read_changes(tmp_path)[0]["after"] == both


class TestTheLog:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_one_is_named(self, folder, damage):
        path = folder / "log.jsonl"
        path.unlink()
        DAMAGES[damage](path)
        if damage == "zeros":  # as after a crash of the machine: a last line that was not written
            assert read_log(folder) == []
            return
        with pytest.raises((OSError, ValueError), match=r"log\.jsonl"):
            resume(folder)

    @pytest.mark.parametrize(
        "line",
        [
            '{"loss": 1.0}',
            '{"step": "1"}',
            '{"step": -1}',
            '{"step": 1, "loss": "low"}',
            '{"step": 1, "loss": []}',
            "",
            "{",
            '{"step": 1, "loss": 1' + "0" * 400 + "}",
        ],
    )
    def test_a_line_that_is_no_record_is_named(self, tmp_path, line):
        (tmp_path / "log.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
        with pytest.raises(ValueError, match=r"log\.jsonl is damaged in line 2, .* delete that line"):
            read_log(tmp_path)

    def test_nan_of_earlier_versions_is_no_value(self, tmp_path):
        (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": NaN, "grad_norm": 1e999}\n')
        assert read_log(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]

    def test_lines_are_valid_json(self, tmp_path):
        log = TrainingLog(tmp_path, start_step=0)
        log.append({"step": 1, "loss": float("nan")})
        log.append({"step": 2, "loss": float("inf")})
        assert log.path.read_text() == '{"step": 1, "loss": null}\n{"step": 2, "loss": null}\n'

    def test_a_full_disk_is_one_line_that_names_the_file(self, folder):
        run = resume(folder)
        run.record({"loss": 1.0})
        run.log.path.unlink()
        run.log.path.symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device: '.*log\.jsonl'"):
            run.record({"loss": 1.0})
        assert find_checkpoint(folder, "latest").name == "checkpoint-4"


class TestSpace:
    @staticmethod
    def leave(monkeypatch, free):
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr("sdt_diffusion.utils.files.shutil.disk_usage", lambda folder: usage)

    def test_a_run_whose_first_checkpoint_will_not_fit_does_not_start(self, folder, monkeypatch, tmp_path):
        size = sum(path.stat().st_size for path in files_of(folder / "checkpoint-4"))
        self.leave(monkeypatch, size)
        with pytest.raises(OSError, match=r"A checkpoint and the model will take about .* GB, and .* GB are free"):
            build_run(tmp_path / "other")
        assert not (tmp_path / "other").exists()
        resume(folder)  # there is nothing left to save

    @pytest.mark.parametrize(("limit", "fits"), [(None, False), (3, False), (2, True)])
    def test_one_whose_later_checkpoints_will_not_fit_is_warned(
        self, folder, monkeypatch, tmp_path, caplog, limit, fits
    ):
        size = sum(path.stat().st_size for path in files_of(folder / "checkpoint-4"))
        self.leave(monkeypatch, 3.9 * size)  # three checkpoints and the model
        with caplog.at_level(logging.WARNING):
            build_run(tmp_path / "other", max_train_steps=20, checkpoints_total_limit=limit)
        assert ("What this run will save will take" in caplog.text) is not fits
        assert "set checkpoints_total_limit" in caplog.text or fits
