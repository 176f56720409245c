import json
from dataclasses import asdict
from pathlib import Path

import pytest

from sdt_diffusion import SDTPipeline
from sdt_diffusion.experiments import cell as cell_module
from sdt_diffusion.experiments.cell import Job, run_cell
from sdt_diffusion.experiments.measures import (
    curve,
    final_values,
    make_reference,
    reference_path,
    seconds_per_step,
    thinned,
)
from sdt_diffusion.experiments.result_files import read_result
from sdt_diffusion.experiments.study import Evaluation
from sdt_diffusion.metrics.extractors import build_extractor
from sdt_diffusion.training.distributed import Interrupted
from tests.experiments.studies import STUDY, build_study

#: Changes of the study that make it one of a classifier.
CLASSIFIER = {
    "trainer": "train_classifier",
    "seeds": [0],
    "arguments": {
        **{"dataset": "digits", "model": "SDT-S/4+", "resolution": 8, "max_train_samples": 50, "max_train_steps": 2},
        **{"model_overrides": {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "patch_size": 4}},
        **{"train_batch_size": 8, "validation_steps": 1, "report_to": "none", "cpu_threads": 1},
    },
    "variants": {"none": {"spatial_decay": "none"}},
    "evaluation": {"resolutions": [12], "scaling_images": 4, "batch_size": 360},
}


def references_of(cell, folder):
    """The statistics of the cell's reference at all its resolutions, as the runner computes them."""
    extractor, paths = build_extractor("pixels"), {}
    for key, side in {"trained": None, **{str(side): side for side in cell.evaluation.resolutions}}.items():
        path = reference_path(folder, cell.evaluation, side, extractor)
        make_reference(path, cell.evaluation, side, extractor)
        paths[key] = str(path)
    return paths


def job_of(cell, folder, keep=None, references=None):
    argv, evaluation = cell.filled({})
    return Job(
        result={"study": cell.study, "variant": cell.variant, "seed": cell.seed, "config": cell.config},
        trainer=cell.trainer,
        argv=argv,
        evaluation=asdict(evaluation),
        references=references or {},
        folder=str(folder / "work"),
        output=str(folder / "results" / "small" / f"{cell.name}.json"),
        keep_pipeline=keep and str(folder / keep),
    )


@pytest.fixture
def trainer(monkeypatch):
    """A function that puts another one in the place of the trainer's `main`."""

    class Trainer:
        ARGUMENT_TYPES = cell_module.TRAINERS["train_dit"].ARGUMENT_TYPES

    def replace(main):
        Trainer.main = staticmethod(main)
        monkeypatch.setitem(cell_module.TRAINERS, "train_dit", Trainer)

    return replace


class TestRunCell:
    def test_it_trains_measures_and_leaves_a_small_file_and_the_pipeline(self, tmp_path, trainer):
        more = {"resolutions": [12], "gate_images": 6, "attention_images": 5, "prune_eps": [0.01], "pruning_images": 4}
        cell = build_study(tmp_path, evaluation={**STUDY["evaluation"], **more}).cells()[1]
        job = job_of(cell, tmp_path, keep="kept", references=references_of(cell, tmp_path))
        real = cell_module.TRAINERS["train_dit"].main

        def stop_on_the_way(argv):
            real([*argv, "--max_train_steps=2"])
            for file in Path(job.folder, "run").glob("*.json"):  # as if it had not ended
                file.unlink()
            raise Interrupted("SIGTERM")

        trainer(stop_on_the_way)
        with pytest.raises(Interrupted):
            run_cell(job)
        assert not Path(job.output).exists()
        said = []
        trainer(lambda argv: (said.append(argv), real(argv)))
        run_cell(job)
        record = read_result(Path(job.output), cell)
        assert "--resume_from_checkpoint=latest" in said[0]
        assert record["failed"] is None
        assert record["curves"]["held_out_loss"]["steps"] == [2, 4]
        assert record["curves"]["loss"]["steps"] == [1, 2, 3, 4]
        assert record["metrics"]["held_out_loss"] > 0
        assert record["metrics"]["fd"] > 0
        assert "2 network evaluations, guidance 1" in record["metrics"]["sampler"]
        wider = record["metrics"]["resolutions"]["12"]
        assert wider["scaling"] in wider["held_out_loss_by_scaling"]
        assert len(wider["held_out_loss_by_scaling"]) == 6  # three of positions, two of distances
        assert wider["held_out_loss"] > 0
        assert wider["fd"] != record["metrics"]["fd"]
        assert len(record["metrics"]["gates"]["by_noise"]) == 10
        assert {side: len(blocks) for side, blocks in record["metrics"]["attention"].items()} == {"8": 1, "12": 1}
        assert list(record["metrics"]["pruning"]) == ["0.0", "0.01"]
        assert record["all_arguments"]["spatial_decay"] == "context"
        assert record["parameters"] > 10_000
        assert Path(job.output).stat().st_size < 20_000
        assert str(tmp_path) not in Path(job.output).read_text()
        SDTPipeline.from_pretrained(tmp_path / "kept")
        assert not Path(job.folder, "run").exists()

    def test_a_classifier_is_measured_at_other_resolutions_too(self, tmp_path):
        (cell,) = build_study(tmp_path, **CLASSIFIER).cells()
        record = run_cell(job_of(cell, tmp_path))
        assert record["failed"] is None
        assert record["curves"]["accuracy"]["steps"] == [0, 1, 2]
        assert record["all_arguments"]["max_train_samples"] == 50
        wider = record["metrics"]["resolutions"]["12"]
        assert len(wider["held_out_loss_by_scaling"]) == 9  # three of positions, three of the rotary embedding
        assert wider["held_out_loss"] != record["metrics"]["held_out_loss"]
        assert 0 <= wider["accuracy"] <= 1

    @pytest.mark.parametrize(
        ("error", "reason"),
        [(SystemExit("Error: too few images"), "too few images"), (RuntimeError("a\nbug"), "RuntimeError: a bug")],
    )
    def test_a_failure_is_a_result(self, tmp_path, trainer, error, reason, capsys):
        def fail(argv):
            raise error

        trainer(fail)
        cell = build_study(tmp_path).cells()[0]
        job = job_of(cell, tmp_path)
        assert run_cell(job)["failed"] == reason
        assert read_result(Path(job.output), cell)["failed"] == reason

    def test_a_folder_that_another_process_still_writes_to_is_waited_for(self, tmp_path, monkeypatch):
        calls = []

        class Lock:
            def __init__(self, folder):
                pass

            def acquire(self):
                calls.append(1)
                if len(calls) < 3:
                    raise ValueError("Another process is writing")

        monkeypatch.setattr(cell_module, "FolderLock", Lock)
        monkeypatch.setattr(cell_module.time, "sleep", lambda seconds: None)
        cell_module._wait_for(tmp_path)
        assert len(calls) == 3

    def test_a_job_is_read_as_it_was_written(self, tmp_path):
        job = job_of(build_study(tmp_path).cells()[0], tmp_path)
        assert Job(**json.loads(job.save().read_text())) == job


def test_curves_are_thinned_to_means_of_neighbors():
    records = [{"step": step, "loss": step / 10} for step in range(1, 251)] + [{"step": 9, "loss": None}]
    points = thinned(curve(records, "loss"), most=100)
    assert len(points["steps"]) == 84
    assert points["steps"][0] == 2
    assert points["values"][0] == pytest.approx(0.2)


def test_the_first_interval_which_warms_up_has_no_part_in_the_time_of_a_step():
    records = [{"images_per_second": speed} for speed in (1, 100, 50, 200)]
    assert seconds_per_step(records, 100)["seconds_per_step"] == 1
    assert seconds_per_step(records, 100)["seconds_per_step_first_decile"] == pytest.approx(0.6)


class TestFinalValues:
    def test_a_classifier_has_a_loss_and_an_accuracy(self):
        log = [
            {"step": 0, "test_loss": 2.3, "test_accuracy": 0.1},
            {"step": 5, "test_loss": 0.5, "test_accuracy": 0.8},
        ]
        log.append({"step": 5, "loss": 1.0})
        assert final_values("train_classifier", log) == {"held_out_loss": 0.5, "accuracy": 0.8}

    def test_a_diffusion_model_has_an_error_for_each_range_of_noise_levels(self):
        log = [{"step": 5, "velocity_error": 1, "final_velocity_error": 0.5, "final_velocity_error/0.0-0.1": 0.7}]
        found = final_values("train_dit", log)
        assert found == {"held_out_loss": 0.5, "velocity_error_by_noise_level": {"0.0-0.1": 0.7}}

    @pytest.mark.parametrize("log", [[], [{"step": 5, "velocity_error": None, "final_velocity_error": None}]])
    def test_a_loss_that_is_not_finite_is_a_failure(self, log):
        with pytest.raises(ValueError, match="no finite final_velocity_error"):
            final_values("train_dit", log)


def test_another_extractor_or_resolution_has_another_reference(tmp_path):
    extractor, evaluation = build_extractor("pixels"), Evaluation(reference="digits")
    paths = {reference_path(tmp_path, evaluation, resolution, extractor) for resolution in (None, 8)}
    paths.add(reference_path(tmp_path, Evaluation(reference="other"), None, extractor))
    assert len(paths) == 3
