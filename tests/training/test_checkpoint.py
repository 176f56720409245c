import logging

import pytest
import yaml

from sdt_diffusion.training.checkpoint import (
    CheckpointError,
    check_output_dir,
    check_same_run,
    find_checkpoint,
    is_complete,
    list_checkpoints,
    read_manifest,
    save_checkpoint,
    write_config,
)


def save(folder):
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"12345678")
    (folder / "state").write_bytes(b"abc")


def fail(folder):
    save(folder)
    raise OSError("No space left on device")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_whole_and_knows_its_step(tmp_path):
    path = save_checkpoint(tmp_path, 7, save)
    assert path == tmp_path / "checkpoint-7"
    assert is_complete(path)
    assert read_manifest(path)["step"] == 7
    assert names(tmp_path) == ["checkpoint-7"]


def test_a_failed_save_leaves_nothing_and_keeps_what_there_was(tmp_path):
    save_checkpoint(tmp_path, 1, save)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2 could not be written: No space left .* checkpoint-1 is complete"
    ):
        save_checkpoint(tmp_path, 2, fail, total_limit=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest", "empty manifest"])
def test_latest_skips_a_damaged_checkpoint_with_a_warning(tmp_path, caplog, damage):
    save_checkpoint(tmp_path, 9, save)
    newest = save_checkpoint(tmp_path, 10, save)
    weights = newest / "model" / "weights"
    if damage == "cut":
        weights.write_bytes(b"1234")
    elif damage == "missing":
        weights.unlink()
    elif damage == "manifest":
        (newest / "checkpoint.json").unlink()
    else:
        (newest / "checkpoint.json").write_text("")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-9"
    assert "checkpoint-10: it is incomplete" in caplog.text
    with pytest.raises(ValueError, match="checkpoint-10 is incomplete"):
        find_checkpoint(tmp_path, "checkpoint-10")
    save_checkpoint(tmp_path, 10, save)  # the run gets there again
    assert find_checkpoint(tmp_path, "latest") == newest


def test_a_folder_left_by_a_kill_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-5.partial").mkdir()
    assert list_checkpoints(tmp_path) == []
    assert find_checkpoint(tmp_path, "latest") is None
    save_checkpoint(tmp_path, 5, save)
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_checkpoint_may_be_named_by_path_or_by_name(tmp_path):
    path = save_checkpoint(tmp_path, 3, save)
    save_checkpoint(tmp_path, 4, save)
    assert find_checkpoint(tmp_path, "checkpoint-3") == path
    assert find_checkpoint(tmp_path, str(path)) == path
    with pytest.raises(ValueError, match="There is no checkpoint checkpoint-8"):
        find_checkpoint(tmp_path, "checkpoint-8")


def test_the_limit_deletes_the_oldest(tmp_path):
    for step in (2, 10, 9, 100):
        save_checkpoint(tmp_path, step, save, total_limit=2)
    assert [read_manifest(path)["step"] for path in list_checkpoints(tmp_path)] == [10, 100]
    save_checkpoint(tmp_path, 101, save, total_limit=0)
    assert [read_manifest(path)["step"] for path in list_checkpoints(tmp_path)] == [101]


def test_the_limit_never_deletes_the_checkpoint_just_written(tmp_path):
    damaged = save_checkpoint(tmp_path, 10, save)
    (damaged / "state").unlink()
    path = save_checkpoint(tmp_path, 6, save, total_limit=1)  # the run continues from before the damage
    assert find_checkpoint(tmp_path, "latest") == path


class TestTheOutputFolder:
    config = {"model": "SDT-S/2", "seed": 0, "max_train_steps": 10}  # noqa: RUF012
    other = {"model": "SDT-B/2", "seed": 1, "max_train_steps": 10}  # noqa: RUF012

    def test_checking_a_new_folder_creates_nothing(self, tmp_path):
        check_output_dir(tmp_path / "a", self.config, resume=False)
        check_output_dir(tmp_path / "a", self.config, resume=True)
        assert names(tmp_path) == []
        write_config(tmp_path / "a" / "b", self.config)
        assert yaml.safe_load((tmp_path / "a" / "b" / "training_config.yaml").read_text()) == self.config

    @pytest.mark.parametrize("steps", [0, 1])
    def test_another_runs_folder_is_refused_from_its_first_step(self, tmp_path, steps):
        write_config(tmp_path, self.config)
        for step in range(steps):
            save_checkpoint(tmp_path, step + 1, save)
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"another config: model: 'SDT-S/2' there, 'SDT-B/2' now; seed: 0"):
                check_output_dir(tmp_path, self.other, resume)

    def test_the_same_run_continues_only_when_asked_to(self, tmp_path):
        write_config(tmp_path, self.config)
        check_output_dir(tmp_path, self.config, resume=False)  # nothing came of it yet
        save_checkpoint(tmp_path, 1, save)
        with pytest.raises(ValueError, match=r"already holds this run.*resume_from_checkpoint latest"):
            check_output_dir(tmp_path, self.config, resume=False)
        check_output_dir(tmp_path, {**self.config, "max_train_steps": 20}, resume=True, may_differ=["max_train_steps"])

    @pytest.mark.parametrize("name", ["model_index.json", "checkpoint-4"])
    def test_a_folder_of_other_work_is_refused(self, tmp_path, name):
        (tmp_path / name).mkdir()
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"holds {name} of something else"):
                check_output_dir(tmp_path, self.config, resume)

    def test_a_checkpoint_knows_its_run(self, tmp_path):
        manifest = read_manifest(save_checkpoint(tmp_path, 1, save, config=self.config))
        check_same_run("it", manifest["config"], self.config)
        with pytest.raises(ValueError, match="it is of a run with another config: model: 'SDT-S/2' there"):
            check_same_run("it", manifest["config"], self.other)

    def test_arguments_that_are_newer_than_a_checkpoint_have_their_defaults_there(self):
        saved, defaults = {"seed": 0}, {"seed": 0, "optimizer": "adamw"}
        check_same_run("it", saved, {"seed": 0, "optimizer": "adamw"}, defaults=defaults)
        with pytest.raises(ValueError, match="optimizer: 'adamw' there, 'muon' now"):
            check_same_run("it", saved, {"seed": 0, "optimizer": "muon"}, defaults=defaults)


def test_a_run_does_not_start_again_over_checkpoints_that_are_all_damaged(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    for step in (1, 2):
        damaged = save_checkpoint(tmp_path, step, save) / "state"
        damaged.write_bytes(b"abd")
    with pytest.raises(ValueError, match=r"All checkpoints in .* are damaged: move them away"):
        find_checkpoint(tmp_path, "latest")
