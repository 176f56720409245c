import math

import pytest
import torch
from torch import nn

from sdt_diffusion.training.optimizer import (
    OptimizationArguments,
    admit_step,
    build_lr_schedule,
    build_optimizer,
)


def rates(args, groups=None, steps=100):
    model = nn.Linear(2, 2)
    groups = groups and [{"params": [p], **group} for p, group in zip(model.parameters(), groups, strict=True)]
    optimizer = build_optimizer(model, args, groups)
    set_learning_rates = build_lr_schedule(optimizer, args, steps)
    found = []
    for step in range(steps + 1):
        set_learning_rates(step)
        found.append([group["lr"] for group in optimizer.param_groups])
    return torch.tensor(found)


def test_the_cosine_ends_at_the_least_rate_after_a_warm_up_from_zero():
    args = OptimizationArguments(learning_rate=2e-3, lr_scheduler="cosine", lr_warmup_steps=20, min_lr=1e-5)
    found = rates(args)[:, 0]
    torch.testing.assert_close(found[:21], torch.linspace(0, 2e-3, 21))
    cosine = [1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * step / 80)) / 2 for step in range(81)]
    torch.testing.assert_close(found[20:], torch.tensor(cosine))


def test_groups_have_rates_of_their_own_down_to_the_end():
    args = OptimizationArguments(learning_rate=1e-3, lr_scheduler="cosine", min_lr=1e-5)
    found = rates(args, [{"lr_scale": 0.5, "weight_decay": 0.1}, {"lr_scale": 1.0, "weight_decay": 0.0}])
    torch.testing.assert_close(found[:, 0], 0.5 * found[:, 1])
    torch.testing.assert_close(found[-1], torch.tensor([5e-6, 1e-5]))


def test_what_is_frozen_is_left_out():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizationArguments())
    assert [p for group in optimizer.param_groups for p in group["params"]] == [model.bias]


def test_a_least_rate_above_the_peak_is_refused():
    with pytest.raises(ValueError, match=r"min_lr 0.1 is above learning_rate 0.01"):
        OptimizationArguments(learning_rate=0.01, min_lr=0.1)


def test_a_step_that_is_not_admitted_leaves_weights_and_moments_as_they_are():
    def steps(admitted):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = build_optimizer(model, OptimizationArguments(learning_rate=0.1, adam_weight_decay=0.1))
        for finite in admitted:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1.0 if finite else math.nan)
            admit_step(optimizer, torch.tensor(finite))
            optimizer.step()
        states = [optimizer.state[parameter] for parameter in model.parameters()]
        return [*model.parameters(), *(value for state in states for value in state.values())]

    for found, expected in zip(steps([False, True, False, False, True]), steps([True, True]), strict=True):
        assert torch.equal(found, expected)


def rates_of(model, *pairs):
    optimizer = build_optimizer(model, OptimizationArguments(learning_rate=0.01, lr_groups=list(pairs)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_parts_of_names_have_rates_of_their_own():
    model = nn.ModuleDict({"gate": nn.Linear(2, 2), "gates": nn.Linear(2, 2), "10": nn.Linear(2, 2)})
    assert rates_of(model, "gate=10", "bias=0.5", "1*=3") == pytest.approx(
        {"gate.weight": 0.1, "gate.bias": 0.05, "gates.weight": 0.01, "gates.bias": 0.005}
        | {"10.weight": 0.03, "10.bias": 0.015}
    )


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"lr_groups: 'gat' matches no trained parameter. .* parts weight, bias"):
        rates_of(nn.Linear(2, 2), "gat=2")


@pytest.mark.parametrize(
    "pairs", [["gate"], ["=2"], ["gate=x"], ["gate=0"], ["gate=nan"], ["gate=-1"], ["a=1", "a=2"]]
)
def test_pairs_that_are_none_are_refused(pairs):
    with pytest.raises(ValueError, match="lr_groups"):
        OptimizationArguments(lr_groups=pairs)
