import torch

from sdt_diffusion.training.state import BatchNormStatistics


def test_a_batch_that_is_not_finite_changes_no_state():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1)).train()
    statistics = BatchNormStatistics(model, num_processes=1)
    statistics.remember()
    model(torch.randn(4, 3, 8, 8))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    statistics.remember()
    model(torch.full((4, 3, 8, 8), torch.inf))
    assert not model[0].running_mean.isfinite().all()
    statistics.settle(torch.tensor(False))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_a_finite_batch_changes_it():
    model = torch.nn.BatchNorm2d(3).train()
    statistics = BatchNormStatistics(model, num_processes=1)
    statistics.remember()
    model(torch.ones(4, 3, 8, 8))
    statistics.settle(torch.tensor(True))
    torch.testing.assert_close(model.running_mean, torch.full((3,), 0.1))
    assert model.num_batches_tracked == 1


def test_models_without_them_are_left_alone():
    statistics = BatchNormStatistics(torch.nn.Linear(2, 2), num_processes=4)
    statistics.remember()
    statistics.settle(torch.tensor(True))
    assert statistics.tensors == []
