import math
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from sdt_diffusion.sdt import transformer_sdt
from sdt_diffusion.training import distributed
from sdt_diffusion.training.checkpoint import find_checkpoint, read_manifest
from sdt_diffusion.training.distributed import Interrupted
from sdt_diffusion.training.monitor import NonFiniteLossError, StepValues
from sdt_diffusion.training.objectives import DiffusionLoss, ObjectiveArguments, build_objective
from tests.training.helpers import build_run, mean_loss, trained, weights_of


class Watcher:
    """A validation that notes the step, the checkpoints there are, and the weights."""

    def __init__(self, then=None):
        self.steps, self.checkpoints, self.weights, self.then = [], [], [], then

    def __call__(self, run):
        self.steps.append(run.step)
        self.checkpoints.append(sorted(path.name for path in run.output_dir.glob("checkpoint-*")))
        self.weights.append(weights_of(run))
        if self.then is not None:
            self.then(run)
        return {"seen": float(run.step)}


EVERY_STEP = {"validation_steps": 1}


def test_validates_every_step_before_its_checkpoint(tmp_path):
    watcher = Watcher()
    run = trained(build_run(tmp_path / "out", config=EVERY_STEP), validate=watcher)
    assert watcher.steps == [1, 2, 3, 4, 5, 6]
    assert watcher.checkpoints[3] == ["checkpoint-2"]
    assert sorted(path.name for path in run.output_dir.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    assert [record["seen"] for record in run.log.records if "seen" in record] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("interval", "expected"), [(0, [6]), (4, [4, 6])])
def test_validates_when_due_and_at_the_end(tmp_path, interval, expected):
    watcher = Watcher()
    trained(build_run(tmp_path / "out", config={"validation_steps": interval}), validate=watcher)
    assert watcher.steps == expected


def test_validates_before_the_first_step_if_asked_to(tmp_path):
    watcher = Watcher()
    trained(build_run(tmp_path / "out", config={"validation_steps": 3, "validate_first": True}), validate=watcher)
    assert watcher.steps == [0, 3, 6]


def test_a_validation_that_a_kill_prevented_is_made_on_resuming(tmp_path):
    def resume(watcher):
        config = {"validation_steps": 4}
        trained(build_run(tmp_path / "out", resume_from_checkpoint="latest", config=config), validate=watcher)

    trained(build_run(tmp_path / "out", max_train_steps=4))  # checkpoint-4, and no validation
    watcher = Watcher()
    resume(watcher)
    assert watcher.steps == [4, 6]
    again = Watcher()
    resume(again)
    assert again.steps == []


def test_sampling_in_between_changes_nothing(tmp_path):
    def disturb(run):
        torch.rand(run.step)  # draws from the global generator, as sampling would
        run.unwrapped_model.eval()

    undisturbed = trained(build_run(tmp_path / "out"))
    disturbed = trained(build_run(tmp_path / "other", config=EVERY_STEP), validate=Watcher(disturb))
    for a, b in zip(weights_of(undisturbed), weights_of(disturbed), strict=True):
        assert torch.equal(a, b)


def spoiled(loss, model, what):
    if what == "loss":
        return loss * math.nan
    return loss + (model.proj_out_2.bias.sum() * 0).sqrt()  # a finite value with an infinite gradient


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, what):
    def compute_loss(model, images, labels, draws):
        loss = mean_loss(model, images, labels, draws)
        return spoiled(loss, model, what) if run.step == 3 else loss

    watcher, run = Watcher(), build_run(tmp_path / "out", logging_steps=1, config=EVERY_STEP)
    trained(run, compute_loss, watcher)
    after = dict(zip(watcher.steps, watcher.weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after[3], after[4], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(after[4], after[6], strict=True))
    records = [record for record in run.log.records if "learning_rate" in record]
    assert ["loss" in record for record in records] == [True] * 3 + [False] + [True] * 2
    assert [record.get("skipped_steps") for record in records] == [None] * 3 + [1] * 3
    assert read_manifest(run.output_dir / "checkpoint-6")["state"]["guard"]["skipped"] == 1


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_too_many_skipped_steps_end_the_run_and_change_nothing(tmp_path, what):
    def compute_loss(model, images, labels, draws):
        loss = mean_loss(model, images, labels, draws)
        return loss if run.step < 3 else spoiled(loss, model, what)

    watcher, run = Watcher(), build_run(tmp_path / "out", max_skipped_steps=2, config=EVERY_STEP)
    with pytest.raises(NonFiniteLossError, match=rf"The {what} is (nan|inf) at step 6, and 2 step\(s\) before it"):
        trained(run, compute_loss, watcher)
    assert watcher.steps == [1, 2, 3, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(watcher.weights[2], weights_of(run), strict=True))


@pytest.fixture
def late(monkeypatch):
    """Values are read one step late, as from CUDA."""
    build = StepValues.__init__
    monkeypatch.setattr(StepValues, "__init__", lambda self, device: build(self, torch.device("cuda")))


def test_values_that_are_read_late_change_nothing(tmp_path, request):
    def compute_loss(model, images, labels, draws):
        loss = mean_loss(model, images, labels, draws)
        return spoiled(loss, model, "loss") if draws.uniform()[0] < 0.4 else loss

    runs = [trained(build_run(tmp_path / "soon", logging_steps=3), compute_loss)]
    request.getfixturevalue("late")
    runs.append(trained(build_run(tmp_path / "late", logging_steps=3), compute_loss))
    assert 0 < runs[0].guard.skipped < 6
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        soon, later = (read_manifest(run.output_dir / name) for run in runs)
        assert soon["state"] == later["state"]
    for a, b in zip(*map(weights_of, runs), strict=True):
        assert torch.equal(a, b)
    measured = [[record.get(key) for key in ("loss", "grad_norm", "skipped_steps")] for record in runs[0].log.records]
    assert measured == [
        [record.get(key) for key in ("loss", "grad_norm", "skipped_steps")] for record in runs[1].log.records
    ]


def test_too_many_skipped_steps_that_are_noticed_late_leave_no_trace(tmp_path, late):
    def compute_loss(model, images, labels, draws):
        return mean_loss(model, images, labels, draws) * (math.nan if 2 <= run.step < 5 else 1)

    run = build_run(tmp_path / "out", max_skipped_steps=2)
    with pytest.raises(NonFiniteLossError, match=r"The loss is nan at step 5, and 2 step\(s\) before it"):
        trained(run, compute_loss)
    assert sorted(path.name for path in run.output_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_signal_that_is_noticed_late_saves_the_step_reached(tmp_path, late):
    def compute_loss(model, images, labels, draws):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return mean_loss(model, images, labels, draws)

    run = build_run(tmp_path / "out", checkpointing_steps=0, logging_steps=100)
    with pytest.raises(Interrupted):
        trained(run, compute_loss)
    manifest = read_manifest(find_checkpoint(run.output_dir, "latest"))
    assert manifest["step"] == run.step == 4


def test_a_step_asks_the_device_for_no_value(tmp_path, late, monkeypatch):
    """The loss of diffusion models too; what is logged is asked for."""

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                asked.add(run.step)
            return function(*args, **(kwargs or {}))

    asked = set()
    # Labels are checked on CPUs only.
    monkeypatch.setattr(transformer_sdt, "check_input", lambda config, images, labels: images.shape[-2:])
    loss = DiffusionLoss(build_objective(ObjectiveArguments()), class_dropout_prob=0.5)
    run = build_run(tmp_path / "out", checkpointing_steps=0, logging_steps=100)
    with Asked():
        trained(run, loss)
    assert asked == {0, 6}  # a seed of the loader; whether the checkpoint is finite


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_a_compiled_run_makes_one_graph_and_saves_the_same_weights(tmp_path, monkeypatch, mode):
    torch.compiler.reset()
    counter, compile_module = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, backend=counter, **how))
    loss = DiffusionLoss(build_objective(ObjectiveArguments()), class_dropout_prob=0.5)
    kwargs = {"gradient_accumulation_steps": 2, "config": {"validation_steps": 2}, "model": {"num_layers": 3}}

    def sample(run):
        images = torch.zeros(7, 3, 8, 8)
        with torch.no_grad():
            run.trained_model(images, torch.ones(7), torch.zeros(7, dtype=torch.long))

    plain = trained(build_run(tmp_path / "plain", **kwargs), loss)
    run = trained(build_run(tmp_path / "compiled", compile=mode, **kwargs), loss, Watcher(sample))
    assert f"compiled ({mode})" in run.describe()
    assert counter.frame_count == 1
    names = [path.relative_to(plain.output_dir) for path in plain.output_dir.rglob("checkpoint-6/**/*.safetensors")]
    assert len(names) == 3
    for name in names:
        expected, found = (load_file(each.output_dir / name) for each in (plain, run))
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key])


def test_accumulation_makes_one_step_of_several_batches(tmp_path):
    sizes = []

    def compute_loss(model, images, labels, draws):
        sizes.append(len(images))
        return mean_loss(model, images, labels, draws)

    run = trained(build_run(tmp_path / "out", gradient_accumulation_steps=3), compute_loss)
    assert run.step == 6
    assert sizes == [4] * 18


def test_one_large_batch_is_as_good_as_two_small_ones(tmp_path):
    """The noise of an image follows from its place in the step, and not from its batch."""
    loss = DiffusionLoss(build_objective(ObjectiveArguments()), class_dropout_prob=0.5)
    # With its usual epsilon AdamW makes full steps of gradients that are nothing but rounding errors.
    optimization = {"adam_epsilon": 1e-4}
    small = trained(build_run(tmp_path / "s", optimization=optimization, gradient_accumulation_steps=2), loss)
    large = trained(build_run(tmp_path / "l", optimization=optimization, train_batch_size=8), loss)
    for a, b in zip(weights_of(small), weights_of(large), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_signal_saves_and_ends_with_its_code(tmp_path, capfd, number, name, code):
    before = signal.getsignal(number)
    run = build_run(tmp_path / "out", config=EVERY_STEP)
    watcher = Watcher(lambda run: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as stop:
        trained(run, validate=watcher)
    assert stop.value.code == code
    assert watcher.steps == [1]
    assert find_checkpoint(run.output_dir, "latest").name == "checkpoint-2"
    assert signal.getsignal(number) is before
    captured = capfd.readouterr()
    assert f"Stopped by {name} after step 2, which checkpoint-2 holds. Continue with" in captured.out
    assert ("Press Ctrl-C again to end it now." in captured.err) == (name == "Ctrl-C")


def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing_half_written(tmp_path):
    run = build_run(tmp_path / "out", config=EVERY_STEP)
    save = run.state.save

    def interrupted(*args):
        save(*args)
        os.kill(os.getpid(), signal.SIGINT)

    run.state.save = interrupted
    with pytest.raises(KeyboardInterrupt):
        trained(run, validate=Watcher(lambda run: os.kill(os.getpid(), signal.SIGINT)))
    assert list(run.output_dir.glob("checkpoint-*")) == []


def test_ctrl_c_stays_ignored_in_a_background_process(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        watcher = Watcher(lambda run: os.kill(os.getpid(), signal.SIGINT))
        assert trained(build_run(tmp_path / "out", config=EVERY_STEP), validate=watcher).step == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reader_of_the_output_that_has_ended_costs_no_checkpoint(tmp_path, monkeypatch):
    """As tee has, which the same Ctrl-C reaches."""
    run = build_run(tmp_path / "out", config=EVERY_STEP, logging_steps=1)

    def stop(run):
        os.kill(os.getpid(), signal.SIGTERM)
        reader, writer = os.pipe()
        os.close(reader)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, os.fdopen(os.dup(writer), "w"))

    with pytest.raises(Interrupted):
        trained(run, validate=Watcher(stop))
    assert find_checkpoint(run.output_dir, "latest").name == "checkpoint-2"


def test_the_end_of_the_launcher_saves_and_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "_LAUNCHER", os.getpid())  # as if it had been another parent than now
    run = build_run(tmp_path / "out")
    with pytest.raises(Interrupted) as stop:
        trained(run)
    assert stop.value.code == 143
    assert "Stopped by the end of its launcher after step 1, which checkpoint-1 holds." in capsys.readouterr().out


def test_records_say_how_far_how_fast_and_with_how_much_memory(tmp_path):
    config = {"flops_per_image": 1e6}
    run = trained(build_run(tmp_path / "out", logging_steps=3, peak_tflops=2, config=config))
    first, second = (record for record in run.log.records if "loss" in record)
    assert (first["step"], second["step"]) == (3, 6)
    assert first["epoch"] == pytest.approx(3 * 4 / 20)
    assert second["tflops_per_second"] == pytest.approx(3e6 * second["images_per_second"] / 1e12)
    assert second["mfu"] == pytest.approx(second["tflops_per_second"] / 2)
    assert 0 < first["elapsed_seconds"] < second["elapsed_seconds"]
    assert first["seconds_left"] == pytest.approx(3 * 4 / first["images_per_second"])
    assert second["seconds_left"] == 0
    assert second["memory_gib"] > 0
