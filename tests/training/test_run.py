import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.training.checkpoint import find_checkpoint
from sdt_diffusion.training.optimizer import OptimizationArguments, build_optimizer
from sdt_diffusion.utils.files import LOCK_FILE
from sdt_diffusion.utils.seeding import Stream, seed_global_generators
from tests.conftest import TINY
from tests.training.helpers import build_run, trained, weights_of


@pytest.fixture
def make_run(tmp_path):
    return lambda output_dir="out", **kwargs: build_run(tmp_path / output_dir, **kwargs)


def test_a_run_says_what_it_trains_with(make_run, capsys):
    run = make_run(gradient_accumulation_steps=2)
    parameters = sum(p.numel() for p in run.unwrapped_model.parameters())
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line == run.describe()
    assert line.startswith("1 process(es) on cpu (1 thread(s)), fp32")
    assert f"{parameters:,} trained of {parameters:,} parameters; 20 images, 8 a step (4 x 2 a process)" in line


def test_latest_without_a_checkpoint_starts_from_the_beginning(make_run):
    assert make_run(resume_from_checkpoint="latest").step == 0


def test_a_folder_is_the_runs_from_its_first_step(make_run):
    run = make_run(max_train_steps=1)
    assert not (run.output_dir / "training_config.yaml").exists()
    trained(run)
    assert (run.output_dir / "training_config.yaml").exists()


def test_no_interval_means_one_checkpoint_at_the_end(make_run):
    run = trained(make_run(checkpointing_steps=0))
    assert [path.name for path in run.output_dir.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_checkpoint_of_another_run_is_refused(make_run):
    checkpoint = trained(make_run()).output_dir / "checkpoint-4"
    with pytest.raises(ValueError, match=r"checkpoint-4 is of a run with another config: seed: 0 there, 1 now"):
        make_run("other", seed=1, resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r"train_batch_size \* .* \* processes: 4 there, 8 now"):
        make_run(resume_from_checkpoint=str(checkpoint), gradient_accumulation_steps=2)


def test_a_checkpoint_of_another_model_is_refused_with_all_that_differs(make_run):
    trained(make_run())
    with pytest.raises(ValueError, match=r"transformer is another model: num_classes: 5 there, 7 now; qk_norm"):
        make_run(resume_from_checkpoint="latest", model={"num_classes": 7, "qk_norm": "rms_norm"})


def test_arguments_that_change_no_step_may_differ(make_run):
    trained(make_run(max_train_steps=2))
    make_run(resume_from_checkpoint="latest", cpu_threads=2, logging_steps=1, max_skipped_steps=3)


def test_a_change_that_is_asked_for_is_made_and_recorded(make_run):
    trained(make_run(max_train_steps=2))
    lower = {"optimization": {"learning_rate": 1e-3}, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 there, 0.001 now.*change_on_resume"):
        make_run(**lower)
    run = trained(make_run(**lower, change_on_resume=["learning_rate"], max_train_steps=4))
    assert run.optimizer.param_groups[0]["lr"] == 1e-3
    config = yaml.safe_load((run.output_dir / "training_config.yaml").read_text())
    assert config["learning_rate"] == 1e-3
    expected = {"step": 2, "argument": "learning_rate", "before": 0.01, "after": 0.001}
    assert config["changes"] == [expected]
    # Afterwards it is the run's own value, and the record stays.
    run = trained(make_run(**lower))
    assert yaml.safe_load((run.output_dir / "training_config.yaml").read_text())["changes"] == [expected]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"change_on_resume": ["learning_rate"]}, "change_on_resume learning_rate needs resume_from_checkpoint"),
        (
            {"change_on_resume": ["learning"], "resume_from_checkpoint": "latest"},
            "change_on_resume learning needs an argument of this script",
        ),
    ],
)
def test_changes_that_cannot_be_are_refused(make_run, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_run(**kwargs)


@pytest.mark.parametrize(
    ("optimizer", "ema"),
    [
        ("adamw", {}),
        ("muon", {"use_ema": False}),
        ("adamw", {"ema_profile": "power", "ema_sigma_rel": [0.1, 0.2]}),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights_moments_and_averages(make_run, optimizer, ema):
    how = {"optimization": {"optimizer": optimizer}, "ema": ema}
    whole = trained(make_run("whole", **how))
    trained(make_run("part", **how, max_train_steps=3))
    part = make_run("part", **how, resume_from_checkpoint="latest")
    assert part.step == 3
    trained(part)
    files = [path.relative_to(whole.output_dir) for path in whole.output_dir.rglob("checkpoint-6/**/*.safetensors")]
    assert len(files) == 2 + len(whole.averages)
    for name in files:
        expected, found = (load_file(run.output_dir / name) for run in (whole, part))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    product = dict(part.trained_model.named_parameters())
    assert all(torch.equal(tensor, product[name]) for name, tensor in whole.trained_model.named_parameters())


def test_a_finished_run_has_its_model_again_when_it_is_resumed(make_run):
    first = trained(make_run())
    again = make_run(resume_from_checkpoint="latest")
    before = weights_of(again)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trained(again)), strict=True))
    product = dict(again.trained_model.named_parameters())
    assert all(torch.equal(tensor, product[name]) for name, tensor in first.trained_model.named_parameters())


def test_a_later_checkpoint_than_wanted_is_refused(make_run):
    trained(make_run())
    with pytest.raises(ValueError, match="checkpoint-6 is later than max_train_steps 5: there is nothing"):
        make_run(resume_from_checkpoint="latest", max_train_steps=5)
    with pytest.raises(ValueError, match=r"also holds checkpoint-6, later than .*checkpoint-4: move them away"):
        make_run(resume_from_checkpoint="checkpoint-4")


def test_a_run_is_resumed_with_the_same_data_wherever_they_lie(make_run):
    data = {"identity": {"cache of latents": "abc"}, "relocatable": ("output_dir", "report_to")}
    trained(make_run(max_train_steps=2, data=data))
    trained(make_run(resume_from_checkpoint="latest", data=data))
    other = {**data, "identity": {"cache of latents": "def"}}
    with pytest.raises(ValueError, match="another config: cache of latents: 'abc' there, 'def' now"):
        make_run(resume_from_checkpoint="latest", data=other)


def test_processes_that_see_different_checkpoints_are_refused(make_run, monkeypatch):
    trained(make_run(max_train_steps=2))
    monkeypatch.setattr("sdt_diffusion.training.run.gather_object", lambda seen: [*seen, "None"])
    with pytest.raises(ValueError, match=r"checkpoint-2, None\): it must lie on a disk that all of them share"):
        make_run(resume_from_checkpoint="latest")


def test_a_folder_that_another_process_writes_to_is_refused(make_run, tmp_path):
    (tmp_path / "out").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "out" / LOCK_FILE], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"Another process is writing to .*out"):
            make_run()
        other.communicate("\n")
    make_run()


def test_pictures_reach_every_tracker_in_the_form_it_takes(make_run):
    class Tracker:
        def __init__(self, name):
            self.name = name

        def log_images(self, values, step, **kwargs):
            self.seen = ({key: value.shape for key, value in values.items()}, step, kwargs)

    run = make_run()
    run.accelerator.trackers = [Tracker("tensorboard"), Tracker("wandb")]
    run.save_picture("samples/a.png", Image.new("RGB", (6, 4)))
    assert (run.output_dir / "samples" / "a.png").is_file()
    assert run.accelerator.trackers[0].seen == ({"samples": (1, 4, 6, 3)}, 0, {"dataformats": "NHWC"})
    assert run.accelerator.trackers[1].seen == ({"samples": (1, 4, 6, 3)}, 0, {})


def test_a_missing_checkpoint_is_refused_before_anything_is_written(make_run, tmp_path):
    with pytest.raises(ValueError, match="There is no checkpoint checkpoint-7"):
        make_run(resume_from_checkpoint="checkpoint-7")
    assert not (tmp_path / "out").exists()


def test_the_config_and_its_arguments_are_not_changed(make_run):
    run = make_run()
    with pytest.raises(AttributeError):
        run.config.run = None
    with pytest.raises(AttributeError):
        run.config.run.mixed_precision = "bf16"
    assert find_checkpoint(run.output_dir, "latest") is None


def test_weight_decay_spares_biases_norms_tables_and_gates():
    model = SDTTransformer2DModel(**TINY, qk_norm="rms_norm")
    optimizer = build_optimizer(model, OptimizationArguments(adam_weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in decayed}
    spared = (".bias", ".norm_q.weight", ".norm_k.weight", ".class_embedder.weight")
    assert all(name.endswith(spared) or ".gate." in name for name in names)
    assert "transformer_blocks.0.attn.gate.proj.weight" in names
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_batches_are_seeded_by_seed_and_position():
    draws = []
    for key in [(0, 0), (1, 0), (0, 1), (0, 0)]:
        seed_global_generators(Stream.BATCH, *key)
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 3
    assert draws[0] == draws[-1]


def test_what_files_disks_and_lost_processes_raise_names_the_last_checkpoint(make_run):
    gloo = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer")
    last = "There is no checkpoint yet."
    for _ in range(2):
        run = make_run(resume_from_checkpoint="latest")
        for error in (OSError(28, "No space left on device"), gloo):
            with pytest.raises(OSError, match=last), run:
                raise error
        with pytest.raises(RuntimeError, match=r"^a bug$"), run:
            raise RuntimeError("a bug")
        trained(run)
        last = "checkpoint-6 is complete: continue with resume_from_checkpoint latest."


def test_a_new_folder_is_locked_at_once_and_removed_if_nothing_is_written(make_run, tmp_path):
    with make_run("new/out"):
        assert (tmp_path / "new" / "out" / LOCK_FILE).exists()
    assert list(tmp_path.iterdir()) == []
    with make_run("new/out") as run:
        trained(run)
    assert (tmp_path / "new" / "out" / "checkpoint-6").is_dir()


def test_a_tracker_that_cannot_start_is_named_and_leaves_no_folder(make_run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("an account")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    with pytest.raises(ValueError, match=r"report_to none cannot start: 'an account'\. Correct this, or set"):
        make_run()
    assert list(tmp_path.iterdir()) == []
