import pytest
import torch

from sdt_diffusion.training.arguments import OptimizationArguments
from sdt_diffusion.training.ema import ModelEMA


def averages(steps, **kwargs):
    """The average after each step, of a weight that is set to 1, 2, 3 ..."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = ModelEMA(model, OptimizationArguments(**kwargs), torch.device("cpu"))
    values = []
    for step in range(1, steps + 1):
        torch.nn.init.constant_(model.weight, float(step))
        ema.step(model, step)
        values.append(ema.model.weight.item())
    return values


def expected(steps, decay, min_decay=0.0):
    average, values = 0.0, []
    for step in range(1, steps + 1):
        ramp = max(min((1 + step - 1) / (10 + step - 1), decay), min_decay) if step > 1 else 0.0
        average = ramp * average + (1 - ramp) * step
        values.append(average)
    return values


@pytest.mark.parametrize("kwargs", [{"ema_decay": 0.9999}, {"ema_decay": 0.3}, {"ema_min_decay": 0.9999}])
def test_average_follows_the_ramped_recursion(kwargs):
    wanted = expected(30, kwargs.get("ema_decay", 0.9999), kwargs.get("ema_min_decay", 0.0))
    assert averages(30, **kwargs) == pytest.approx(wanted, rel=1e-5)


def test_the_average_is_ready_to_sample_and_takes_no_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).train()
    ema = ModelEMA(model, OptimizationArguments(), torch.device("cpu"))
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_statistics_of_batch_norms_are_averaged_along():
    model = torch.nn.BatchNorm1d(1, affine=False)
    ema = ModelEMA(torch.nn.Sequential(torch.nn.Linear(1, 1), model), OptimizationArguments(), torch.device("cpu"))
    holder = torch.nn.Sequential(torch.nn.Linear(1, 1), model)
    for step in range(1, 21):
        model.running_mean.fill_(step)
        model.num_batches_tracked.fill_(step)
        ema.step(holder, step)
    assert ema.model[1].running_mean.item() == pytest.approx(expected(20, 0.9999)[-1], rel=1e-5)
    assert ema.model[1].num_batches_tracked == 20
