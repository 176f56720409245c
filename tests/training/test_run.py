import json
import math

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.data import DataArguments
from sdt_diffusion.training.arguments import OptimizationArguments, RunArguments
from sdt_diffusion.training.optimizer import build_optimizer
from sdt_diffusion.training.run import NonFiniteLossError, Training, seed_batch
from tests.conftest import TINY


class Images:
    def __len__(self):
        return 20

    def __getitems__(self, indices):
        return [(torch.full((3, 8, 8), i / 20), i % 5) for i in indices]


@pytest.fixture
def make_training(tmp_path):
    def make(compute_loss, output_dir="out", **kwargs):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        run = RunArguments(
            output_dir=str(tmp_path / output_dir),
            train_batch_size=4,
            max_train_steps=6,
            report_to="none",
            cpu_threads=1,
            **{"checkpointing_steps": 2, **kwargs},
        )
        optimization, data = OptimizationArguments(learning_rate=1e-2), DataArguments()
        torch.manual_seed(0)
        model = SDTTransformer2DModel(**TINY)
        return Training(
            model, "transformer", compute_loss, Images(), run, optimization, data, (run, optimization, data)
        )

    return make


def mean_loss(model, images, labels):
    return (model(images, torch.rand(len(images)) * 1000, labels).sample - images).square().mean()


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


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_bad_step_is_not_made(make_training, what):
    def compute_loss(model, images, labels):
        loss = mean_loss(model, images, labels)
        if training.step < 3:
            return loss
        if what == "loss":
            return loss * math.nan
        return loss + (model.proj_out_2.bias.sum() * 0).sqrt()  # a finite value with an infinite gradient

    training = make_training(compute_loss)
    steps = training.steps()
    assert [next(steps) for _ in range(3)] == [1, 2, 3]
    before = state(training)
    with pytest.raises(NonFiniteLossError, match=rf"The {what} is (nan|inf) at step 4"):
        next(steps)
    for a, b in zip(before, state(training), strict=True):
        assert torch.equal(a, b)


def test_accumulation_makes_one_step_of_several_batches(make_training):
    sizes = []

    def compute_loss(model, images, labels):
        sizes.append(len(images))
        return mean_loss(model, images, labels)

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


def test_a_checkpoint_of_another_run_or_process_count_is_refused(make_training):
    first = make_training(mean_loss)
    list(first.steps())
    checkpoint = first.output_dir / "checkpoint-4"
    with pytest.raises(ValueError, match=r"checkpoint-4 is of a run with another config: seed: 0 there, 1 now"):
        make_training(mean_loss, "other", seed=1, resume_from_checkpoint=str(checkpoint))
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    manifest["config"]["num_processes"] = 2
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="num_processes: 2 there, 1 now"):
        make_training(mean_loss, resume_from_checkpoint=str(checkpoint))


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


def test_batches_are_seeded_by_seed_process_and_number():
    draws = []
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]:
        seed_batch(*key)
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 4
    assert draws[0] == draws[-1]
