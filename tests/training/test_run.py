import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.data import DataArguments
from sdt_diffusion.training.checkpoint import find_checkpoint, read_manifest
from sdt_diffusion.training.config import OptimizationArguments, RunArguments
from sdt_diffusion.training.distributed import Interrupted
from sdt_diffusion.training.monitor import NonFiniteLossError
from sdt_diffusion.training.objectives import DiffusionLoss, ObjectiveArguments, build_objective
from sdt_diffusion.training.optimizer import build_optimizer
from sdt_diffusion.training.run import Training
from sdt_diffusion.utils.files import LOCK_FILE
from sdt_diffusion.utils.seeding import Stream, seed_global_generators
from tests.conftest import TINY


class Images:
    def __len__(self):
        return 20

    def __getitems__(self, indices):
        return [(torch.full((3, 8, 8), i / 20), i % 5) for i in indices]


@pytest.fixture
def make_training(tmp_path):
    def make(compute_loss, output_dir="out", model=None, optimization=None, training=None, **kwargs):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        run = RunArguments(
            output_dir=str(tmp_path / output_dir),
            report_to="none",
            cpu_threads=1,
            **{"train_batch_size": 4, "max_train_steps": 6, "checkpointing_steps": 2, **kwargs},
        )
        optimization, data = OptimizationArguments(learning_rate=1e-2, **(optimization or {})), DataArguments()
        torch.manual_seed(0)
        model = SDTTransformer2DModel(**{**TINY, **(model or {})})
        return Training(
            *(model, "transformer", compute_loss, Images(), run, optimization, data, (run, optimization, data)),
            **(training or {}),
        )

    return make


def mean_loss(model, images, labels, draws):
    return (model(images, draws.uniform() * 1000, labels).sample - images).square().mean()


def state(training):
    return [parameter.detach().clone() for parameter in training.unwrapped_model.parameters()]


def test_yields_every_step_with_checkpoints_when_due(make_training):
    training = make_training(mean_loss)
    seen = []
    for step in training.steps():
        seen.append((step, (training.output_dir / f"checkpoint-{step}").exists()))
    assert seen == [(1, False), (2, True), (3, False), (4, True), (5, False), (6, True)]
    assert list(training.steps()) == []


def test_sampling_in_between_changes_nothing(make_training):
    undisturbed = make_training(mean_loss)
    list(undisturbed.steps())
    disturbed = make_training(mean_loss, "other")
    for step in disturbed.steps():
        torch.rand(step)  # draws from the global generator, as sampling would
        disturbed.unwrapped_model.eval()
    for a, b in zip(state(undisturbed), state(disturbed), strict=True):
        assert torch.equal(a, b)


def spoiled(loss, model, what):
    if what == "loss":
        return loss * math.nan
    return loss + (model.proj_out_2.bias.sum() * 0).sqrt()  # a finite value with an infinite gradient


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(make_training, what):
    def compute_loss(model, images, labels, draws):
        loss = mean_loss(model, images, labels, draws)
        return spoiled(loss, model, what) if training.step == 3 else loss

    training = make_training(compute_loss, logging_steps=1)
    steps = training.steps()
    assert [next(steps) for _ in range(3)] == [1, 2, 3]
    before = state(training)
    assert next(steps) == 4
    assert all(torch.equal(a, b) for a, b in zip(before, state(training), strict=True))
    assert list(steps) == [5, 6]
    assert any(not torch.equal(a, b) for a, b in zip(before, state(training), strict=True))
    assert ["loss" in record for record in training.log.records] == [True] * 3 + [False] + [True] * 2
    assert [record.get("skipped_steps") for record in training.log.records] == [None] * 3 + [1] * 3
    assert read_manifest(training.output_dir / "checkpoint-6")["state"]["guard"]["skipped"] == 1


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_too_many_such_steps_end_the_run_and_change_nothing(make_training, what):
    def compute_loss(model, images, labels, draws):
        loss = mean_loss(model, images, labels, draws)
        return loss if training.step < 3 else spoiled(loss, model, what)

    training = make_training(compute_loss, max_skipped_steps=2)
    steps = training.steps()
    assert [next(steps) for _ in range(3)] == [1, 2, 3]
    before = state(training)
    assert [next(steps) for _ in range(2)] == [4, 5]
    with pytest.raises(NonFiniteLossError, match=rf"The {what} is (nan|inf) at step 6, and 2 step\(s\) before it"):
        next(steps)
    assert all(torch.equal(a, b) for a, b in zip(before, state(training), strict=True))


def test_accumulation_makes_one_step_of_several_batches(make_training):
    sizes = []

    def compute_loss(model, images, labels, draws):
        sizes.append(len(images))
        return mean_loss(model, images, labels, draws)

    assert len(list(make_training(compute_loss, gradient_accumulation_steps=3).steps())) == 6
    assert sizes == [4] * 18


def test_latest_without_a_checkpoint_starts_from_the_beginning(make_training):
    training = make_training(mean_loss, resume_from_checkpoint="latest")
    assert training.step == 0


def test_a_folder_is_the_runs_from_its_first_step(make_training):
    training = make_training(mean_loss)
    assert not (training.output_dir / "training_config.yaml").exists()
    next(training.steps())
    assert (training.output_dir / "training_config.yaml").exists()


def test_no_interval_means_one_checkpoint_at_the_end(make_training):
    training = make_training(mean_loss, checkpointing_steps=0)
    list(training.steps())
    assert [path.name for path in training.output_dir.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_checkpoint_of_another_run_is_refused(make_training):
    first = make_training(mean_loss)
    list(first.steps())
    checkpoint = first.output_dir / "checkpoint-4"
    with pytest.raises(ValueError, match=r"checkpoint-4 is of a run with another config: seed: 0 there, 1 now"):
        make_training(mean_loss, "other", seed=1, resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r"train_batch_size \* .* \* processes: 4 there, 8 now"):
        make_training(mean_loss, resume_from_checkpoint=str(checkpoint), gradient_accumulation_steps=2)


def test_a_checkpoint_of_another_model_is_refused_with_all_that_differs(make_training):
    first = make_training(mean_loss)
    list(first.steps())
    with pytest.raises(ValueError, match=r"transformer is another model: num_classes: 5 there, 7 now; qk_norm"):
        make_training(mean_loss, resume_from_checkpoint="latest", model={"num_classes": 7, "qk_norm": "rms_norm"})


@pytest.mark.parametrize("ema", [{}, {"use_ema": False}, {"ema_profile": "power", "ema_sigma_rel": [0.1, 0.2]}])
def test_a_resumed_run_ends_with_the_same_weights_moments_and_averages(make_training, ema):
    whole = make_training(mean_loss, "whole", optimization=ema)
    list(whole.steps())
    list(make_training(mean_loss, "part", optimization=ema, max_train_steps=3).steps())
    part = make_training(mean_loss, "part", optimization=ema, resume_from_checkpoint="latest")
    assert list(part.steps()) == [4, 5, 6]
    files = [path.relative_to(whole.output_dir) for path in whole.output_dir.rglob("checkpoint-6/**/*.safetensors")]
    assert len(files) == 2 + len(whole.averages)
    for name in files:
        expected, found = (load_file(training.output_dir / name) for training in (whole, part))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    product = dict(part.trained_model.named_parameters())
    assert all(torch.equal(tensor, product[name]) for name, tensor in whole.trained_model.named_parameters())


def test_a_finished_run_has_its_product_again_when_it_is_resumed(make_training):
    first = make_training(mean_loss)
    list(first.steps())
    again = make_training(mean_loss, resume_from_checkpoint="latest")
    assert list(again.steps()) == []
    product = dict(again.trained_model.named_parameters())
    assert all(torch.equal(tensor, product[name]) for name, tensor in first.trained_model.named_parameters())


def test_a_later_checkpoint_than_wanted_is_refused(make_training):
    list(make_training(mean_loss).steps())
    with pytest.raises(ValueError, match="checkpoint-6 is later than --max_train_steps 5: there is nothing"):
        make_training(mean_loss, resume_from_checkpoint="latest", max_train_steps=5)
    with pytest.raises(ValueError, match=r"also holds checkpoint-6, later than .*checkpoint-4: move them away"):
        make_training(mean_loss, resume_from_checkpoint="checkpoint-4")


def test_a_run_goes_on_with_the_same_data_wherever_they_lie(make_training):
    identity = {"identity": {"cache of latents": "abc"}, "named_by_identity": ["output_dir", "report_to"]}
    list(make_training(mean_loss, max_train_steps=2, training=identity).steps())
    list(make_training(mean_loss, resume_from_checkpoint="latest", training=identity).steps())
    other = {**identity, "identity": {"cache of latents": "def"}}
    with pytest.raises(ValueError, match="another config: cache of latents: 'abc' there, 'def' now"):
        make_training(mean_loss, resume_from_checkpoint="latest", training=other)


def test_processes_that_see_different_checkpoints_are_refused(make_training, monkeypatch):
    list(make_training(mean_loss, max_train_steps=2).steps())
    monkeypatch.setattr("sdt_diffusion.training.run.gather_object", lambda seen: [*seen, "None"])
    with pytest.raises(ValueError, match=r"checkpoint-2, None\): it must lie on a disk that all of them share"):
        make_training(mean_loss, resume_from_checkpoint="latest")


def test_a_folder_that_another_process_writes_to_is_refused(make_training, tmp_path):
    (tmp_path / "out").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "out" / LOCK_FILE], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"Another process is writing to .*out"):
            make_training(mean_loss)
        other.communicate("\n")
    make_training(mean_loss)


def test_one_large_batch_is_as_good_as_two_small_ones(make_training):
    """The noise of an image follows from its place in the step, and not from the batch that it came in."""
    loss = DiffusionLoss(build_objective(ObjectiveArguments()), class_dropout_prob=0.5)
    # With its usual epsilon AdamW makes full steps of gradients that are nothing but rounding errors.
    optimization = {"adam_epsilon": 1e-4}
    small = make_training(loss, "small", optimization=optimization, gradient_accumulation_steps=2)
    list(small.steps())
    large = make_training(loss, "large", optimization=optimization, train_batch_size=8)
    list(large.steps())
    for a, b in zip(state(small), state(large), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_sigterm_saves_and_ends_with_the_signals_code(make_training):
    training = make_training(mean_loss)
    steps = training.steps()
    next(steps)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        list(steps)
    assert stop.value.code == 143
    assert find_checkpoint(training.output_dir, "latest").name == "checkpoint-2"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_pictures_reach_every_tracker_in_the_form_it_takes(make_training):
    class Tracker:
        def __init__(self, name):
            self.name = name

        def log_images(self, values, step, **kwargs):
            self.seen = ({key: value.shape for key, value in values.items()}, step, kwargs)

    training = make_training(mean_loss)
    training.accelerator.trackers = [Tracker("tensorboard"), Tracker("wandb")]
    training.save_picture("samples/a.png", lambda: Image.new("RGB", (6, 4)))
    assert (training.output_dir / "samples" / "a.png").is_file()
    assert training.accelerator.trackers[0].seen == ({"samples": (1, 4, 6, 3)}, 0, {"dataformats": "NHWC"})
    assert training.accelerator.trackers[1].seen == ({"samples": (1, 4, 6, 3)}, 0, {})


def test_a_missing_checkpoint_is_refused_before_anything_is_written(make_training, tmp_path):
    with pytest.raises(ValueError, match="There is no checkpoint checkpoint-7"):
        make_training(mean_loss, resume_from_checkpoint="checkpoint-7")
    assert not (tmp_path / "out").exists()


def test_weight_decay_spares_biases_norms_and_alpha():
    model = SDTTransformer2DModel(**TINY, qk_norm="rms_norm")
    optimizer = build_optimizer(model, OptimizationArguments(adam_weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in decayed}
    assert all(name.endswith((".bias", ".log_alpha", ".norm_q.weight", ".norm_k.weight")) for name in names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_batches_are_seeded_by_seed_and_position():
    draws = []
    for key in [(0, 0), (1, 0), (0, 1), (0, 0)]:
        seed_global_generators(Stream.BATCH, *key)
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 3
    assert draws[0] == draws[-1]
