"""Layers that a loss trains with the model."""

import math

import pytest
import torch
from safetensors.torch import load_file

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.training.heads import AverageTeacher
from sdt_diffusion.training.objectives import (
    DiffusionLoss,
    ObjectiveArguments,
    build_auxiliary_losses,
    build_objective,
)
from tests.conftest import TINY
from tests.training.helpers import Projection, build_run, trained


def loss_with_head(seed=0):
    return DiffusionLoss(build_objective(ObjectiveArguments()), class_dropout_prob=0.5, auxiliary=[Projection(seed)])


def run_with_head(output_dir, seed=0, **kwargs):
    loss = loss_with_head(seed)
    run = build_run(output_dir, heads=loss.heads, logging_steps=1, **kwargs)
    return trained(run, loss)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_with_head(tmp_path_factory.mktemp("heads") / "whole")


def test_a_head_is_trained_and_saved_beside_the_model_only(whole):
    folder = whole.output_dir / "checkpoint-6"
    saved = load_file(folder / "heads.safetensors")
    initial = Projection().head.state_dict()
    assert set(saved) == {"heads.projection.weight", "heads.projection.bias"}
    for name, value in initial.items():
        assert torch.equal(saved[f"heads.projection.{name}"], whole.heads.projection.state_dict()[name])
        assert (saved[f"heads.projection.{name}"] - value).abs().max() > 1e-2
    moments = load_file(folder / "optimizer.safetensors")
    assert moments["heads.projection.weight.exp_avg"].abs().max() > 0
    for model in ("transformer", "transformer_ema"):
        assert not any("projection" in name for name in load_file(next((folder / model).glob("*.safetensors"))))
    assert not any("projection" in name for name, _ in whole.trained_model.named_parameters())
    assert all("projection" in record for record in whole.log.records)


def assert_same(run, other, **tolerance):
    checkpoints = [each.output_dir / f"checkpoint-{each.step}" for each in (run, other)]
    names = [path.relative_to(checkpoints[0]) for path in checkpoints[0].rglob("*.safetensors")]
    assert len(names) == 4
    for name in names:
        found, expected = (load_file(checkpoint / name) for checkpoint in checkpoints)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], **tolerance)


def test_a_killed_run_ends_with_the_same_head_and_model(whole, tmp_path):
    run_with_head(tmp_path / "out", max_train_steps=2)
    resumed = run_with_head(tmp_path / "out", seed=1, resume_from_checkpoint="latest")  # another start of the head
    names = sorted(
        path.relative_to(whole.output_dir) for path in whole.output_dir.rglob("checkpoint-6/**/*.safetensors")
    )
    assert len(names) == 4
    for name in names:
        found, expected = load_file(resumed.output_dir / name), load_file(whole.output_dir / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_gradients_are_clipped_together(tmp_path):
    """A head's gradient counts in the norm."""
    run = run_with_head(tmp_path / "out", max_train_steps=1)
    loss = loss_with_head()
    model = build_run(tmp_path / "other", max_train_steps=1)
    images, labels = next(model.batches())
    loss(model.model, images, labels, model.draws(0)).backward()
    gradients = [p.grad for p in [*model.model.parameters(), *loss.heads.parameters()] if p.grad is not None]
    assert run.log.records[0]["grad_norm"] == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-4)
    model.release_folder()


def test_a_head_of_another_shape_is_refused(tmp_path):
    run_with_head(tmp_path / "out", max_train_steps=2)
    heads = torch.nn.ModuleDict({"projection": torch.nn.Linear(3, 4)})
    with pytest.raises(ValueError, match=r"heads\.safetensors .*heads\.projection\.(weight|bias)"):
        build_run(tmp_path / "out", heads=heads, resume_from_checkpoint="latest")


def test_the_teacher_is_the_average(tmp_path):
    run = build_run(tmp_path / "average", ema={"ema_profile": "constant", "ema_decay": 0.5})
    teacher = AverageTeacher(run)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0]), torch.tensor([1, 2])
    before = teacher(*inputs, return_dict=False)[0]
    trained(run)
    found = teacher(*inputs, return_dict=False)[0]
    assert not found.requires_grad
    assert not torch.equal(found, before)
    average = SDTTransformer2DModel(**TINY).eval()
    average.load_state_dict(run.averages["ema"].tensors)
    assert torch.equal(found, average(*inputs).sample)
    without = build_run(tmp_path / "out", ema={"use_ema": False})
    with pytest.raises(ValueError, match="needs use_ema, and no FSDP2"):
        AverageTeacher(without)(*inputs)
    without.release_folder()


#: Every term, on the tiny model of two blocks.
EVERY_TERM = ObjectiveArguments(
    time_shift=2.0,
    direction_loss_weight=1.0,
    contrastive_weight=0.05,
    dispersive_weight=0.5,
    dispersive_images=2,
    self_alignment_weight=0.2,
    self_alignment_teacher_block=2,
)


def run_with_every_term(output_dir, model=None, **kwargs):
    torch.manual_seed(0)
    config = SDTTransformer2DModel(**TINY)
    terms = build_auxiliary_losses(EVERY_TERM, config, train_batch_size=4)
    loss = DiffusionLoss(build_objective(EVERY_TERM), class_dropout_prob=0.5, auxiliary=terms)
    run = build_run(output_dir, model, heads=loss.heads, **kwargs)
    loss.teacher = AverageTeacher(run)
    return trained(run, loss)


def test_every_term_is_resumed_exactly_and_is_the_same_in_one_batch_and_two(tmp_path):
    kwargs = {"max_train_steps": 4, "optimization": {"adam_epsilon": 1e-4}}
    whole = run_with_every_term(tmp_path / "whole", gradient_accumulation_steps=2, **kwargs)
    half = {**kwargs, "max_train_steps": 2}
    run_with_every_term(tmp_path / "part", gradient_accumulation_steps=2, **half)
    part = run_with_every_term(
        tmp_path / "part", gradient_accumulation_steps=2, resume_from_checkpoint="latest", **kwargs
    )
    assert_same(part, whole, rtol=0, atol=0)
    large = run_with_every_term(tmp_path / "large", train_batch_size=8, **kwargs)
    assert_same(large, whole, rtol=0, atol=1e-6)
    assert whole.log.records[-1]["self_alignment_loss"] > 0


def test_every_term_trains_in_half_precision(tmp_path):
    run = run_with_every_term(tmp_path / "out", max_train_steps=2, logging_steps=2, mixed_precision="bf16")
    names = ("loss", "direction_loss", "contrastive_loss", "dispersive_loss", "self_alignment_loss")
    assert all(math.isfinite(run.log.records[-1][name]) for name in names)
