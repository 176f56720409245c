import logging

import pytest
import yaml

from sdt_diffusion.training.checkpoint import (
    checkpoint_step,
    claim_output_dir,
    find_checkpoint,
    is_complete,
    list_checkpoints,
    move_into,
    save_checkpoint,
    write_atomically,
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
    assert checkpoint_step(path) == 7
    assert names(tmp_path) == ["checkpoint-7"]


def test_a_failed_save_leaves_nothing_and_keeps_what_there_was(tmp_path):
    save_checkpoint(tmp_path, 1, save)
    with pytest.raises(OSError, match="No space left"):
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
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [10, 100]
    save_checkpoint(tmp_path, 101, save, total_limit=0)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [101]


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "curve.png"
    write_atomically(path, lambda p: p.write_text("old"))

    def half(partial):
        assert partial.suffix == ".png"
        partial.write_text("ne")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["curve.png"]


def test_moving_into_a_folder_replaces_only_what_is_new(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "old").write_text("")
    (tmp_path / "kept").write_text("")

    def save_pipeline(folder):
        (folder / "transformer").mkdir()
        (folder / "transformer" / "new").write_text("")
        (folder / "model_index.json").write_text("{}")

    move_into(tmp_path, save_pipeline)
    assert names(tmp_path) == ["kept", "model_index.json", "transformer"]
    assert names(tmp_path / "transformer") == ["new"]
    with pytest.raises(OSError, match="No space"):
        move_into(tmp_path, fail)
    assert names(tmp_path) == ["kept", "model_index.json", "transformer"]


class TestClaimingTheOutputFolder:
    config = {"model": "SDT-S/2", "seed": 0, "max_train_steps": 10}  # noqa: RUF012

    def test_a_new_folder_gets_the_config(self, tmp_path):
        claim_output_dir(tmp_path / "a" / "b", self.config, resume=False)
        assert yaml.safe_load((tmp_path / "a" / "b" / "training_config.yaml").read_text()) == self.config

    def test_another_runs_folder_is_refused_and_left_alone(self, tmp_path):
        claim_output_dir(tmp_path, self.config, resume=False)
        save_checkpoint(tmp_path, 1, save)
        before = (tmp_path / "training_config.yaml").read_text()
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"another config: model: 'SDT-S/2' there, 'SDT-B/2' now; seed: 0"):
                claim_output_dir(tmp_path, {**self.config, "model": "SDT-B/2", "seed": 1}, resume)
        assert (tmp_path / "training_config.yaml").read_text() == before

    def test_the_same_run_continues_only_when_asked_to(self, tmp_path):
        claim_output_dir(tmp_path, self.config, resume=False)
        save_checkpoint(tmp_path, 1, save)
        with pytest.raises(ValueError, match=r"already holds this run.*--resume_from_checkpoint latest"):
            claim_output_dir(tmp_path, self.config, resume=False)
        claim_output_dir(tmp_path, {**self.config, "max_train_steps": 20}, resume=True)
        assert yaml.safe_load((tmp_path / "training_config.yaml").read_text())["max_train_steps"] == 20

    def test_a_run_that_came_to_nothing_may_be_started_over(self, tmp_path):
        claim_output_dir(tmp_path, self.config, resume=False)
        claim_output_dir(tmp_path, {**self.config, "seed": 1}, resume=False)
        assert yaml.safe_load((tmp_path / "training_config.yaml").read_text())["seed"] == 1

    @pytest.mark.parametrize("name", ["model_index.json", "checkpoint-4"])
    def test_somebody_elses_work_is_not_overwritten(self, tmp_path, name):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"holds {name} of something else"):
            claim_output_dir(tmp_path, self.config, resume=False)
        assert names(tmp_path) == [name]
