"""Layers that a loss trains with the model."""

import pytest
import torch
from safetensors.torch import load_file

from sdt_diffusion.training.heads import AverageTeacher
from sdt_diffusion.training.objectives import DiffusionLoss, ObjectiveArguments, build_objective
from tests.training.helpers import Projection, build_run, trained


def loss_with_head(seed=0):
    return DiffusionLoss(build_objective(ObjectiveArguments()), class_dropout_prob=0.5, auxiliary=[Projection(seed)])


def run_with_head(output_dir, seed=0, **kwargs):
    loss = loss_with_head(seed)
    run = build_run(output_dir, heads=loss.heads, logging_steps=2, **kwargs)
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


def test_one_large_batch_is_as_good_as_two_small_ones(tmp_path):
    optimization = {"adam_epsilon": 1e-4}  # with the usual one, rounding errors would be full steps
    small = run_with_head(tmp_path / "s", optimization=optimization, gradient_accumulation_steps=2)
    large = run_with_head(tmp_path / "l", optimization=optimization, train_batch_size=8)
    for a, b in zip(small.heads.parameters(), large.heads.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_gradients_are_clipped_together(tmp_path):
    """A head's gradient counts in the norm."""
    run = run_with_head(tmp_path / "out", max_train_steps=1, logging_steps=1)
    loss = loss_with_head()
    model = build_run(tmp_path / "other", max_train_steps=1)
    images, labels = next(model.batches())
    loss(model.model, images, labels, model.draws(0)).backward()
    gradients = [p.grad for p in [*model.model.parameters(), *loss.heads.parameters()] if p.grad is not None]
    assert run.log.records[0]["grad_norm"] == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-4)
    model.release_folder()


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_damaged_head_is_refused(tmp_path, damage):
    run = run_with_head(tmp_path / "out", max_train_steps=2)
    path = run.output_dir / "checkpoint-2" / "heads.safetensors"
    loss = loss_with_head()
    if damage == "missing":
        path.unlink()
    else:
        loss.heads["projection"] = torch.nn.Linear(3, 4)
    with pytest.raises((ValueError, OSError), match=r"heads\.safetensors"):
        build_run(tmp_path / "out", heads=loss.heads, resume_from_checkpoint="latest")


def test_the_teacher_is_the_average(whole, tmp_path):
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0]), torch.tensor([1, 2])
    found = AverageTeacher(whole)(*inputs, return_dict=False)[0]
    assert not found.requires_grad
    whole.trained_model.load_state_dict(whole.averages["ema"].tensors)
    assert torch.equal(found, whole.trained_model(*inputs).sample)
    without = build_run(tmp_path / "out", ema={"use_ema": False})
    with pytest.raises(ValueError, match="needs use_ema, and no FSDP2"):
        AverageTeacher(without)(*inputs)
    without.release_folder()
