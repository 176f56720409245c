"""Numbers that no run can be meant to have, refused where they are declared."""

import dataclasses
import math

import pytest
import torch

from sdt_diffusion.training.config import RunArguments, TrainingConfig, TrainingSet
from sdt_diffusion.training.ema import EMAArguments, constant_profile, power_exponent, ramped_profile
from sdt_diffusion.training.objectives import DiffusionLoss, ObjectiveArguments, build_objective
from sdt_diffusion.training.optimizer import OptimizationArguments, build_lr_schedule, build_optimizer
from sdt_diffusion.training.recipe import RecipeArguments, build_processor
from sdt_diffusion.utils.ranges import RANGE_KEY

TYPES = (RunArguments, OptimizationArguments, EMAArguments, ObjectiveArguments, RecipeArguments)
NUMBERS = [(kind, field) for kind in TYPES for field in dataclasses.fields(kind) if RANGE_KEY in field.metadata]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, "1", True])
@pytest.mark.parametrize(("kind", "field"), NUMBERS, ids=[field.name for _, field in NUMBERS])
def test_no_number_is_anything_else(kind, field, value):
    items = [value] * 2 if "list" in str(field.type) else value
    with pytest.raises(ValueError, match=rf"^{field.name} (must be|is too large)"):
        kind(**{field.name: items})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (RunArguments, {"seed": -1}),
        (RunArguments, {"train_batch_size": 0}),
        (RunArguments, {"cpu_threads": 2000}),
        (RunArguments, {"checkpoints_total_limit": -1}),
        (OptimizationArguments, {"learning_rate": -1e-4}),
        (OptimizationArguments, {"learning_rate": 1e4}),
        (OptimizationArguments, {"adam_beta1": 1.0}),
        (OptimizationArguments, {"adam_beta2": -0.1}),
        (OptimizationArguments, {"adam_epsilon": 0.0}),
        (ObjectiveArguments, {"snr_gamma": 0.0}),
        (ObjectiveArguments, {"logit_std": -1.0}),
        (ObjectiveArguments, {"mode_scale": 2.0}),
        (EMAArguments, {"ema_decay": -0.1}),
        (RecipeArguments, {"mixup": -1.0}),
        (RecipeArguments, {"crop_pct": 1e-9}),
        (RecipeArguments, {"scale": [0.0, 1.0]}),
    ],
)
def test_numbers_beyond_their_ends_are_refused(kind, values):
    with pytest.raises(ValueError, match=f"^{next(iter(values))} must be"):
        kind(**values)


def test_the_ends_of_the_mode_distribution_are_those_at_which_times_stay_between_0_and_1():
    times = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    for scale in (-1, 2 / (math.pi - 2)):
        ObjectiveArguments(weighting_scheme="mode", mode_scale=scale)
        found = 1 - times - scale * (torch.cos(math.pi * times / 2) ** 2 - 1 + times)
        assert found.min() >= -1e-9
        assert found.max() <= 1 + 1e-9
        assert (found.diff() <= 1e-9).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_every_schedule_that_is_accepted_can_be_built(name):
    args = OptimizationArguments(lr_scheduler=name)
    build_lr_schedule(build_optimizer(torch.nn.Linear(2, 2), args), args, 10)(5)


@pytest.mark.parametrize("name", ["piecewise_constant", "exponential"])
def test_others_are_refused(name):
    with pytest.raises(ValueError, match=rf"lr_scheduler must be one of linear, .*, not '{name}'"):
        OptimizationArguments(lr_scheduler=name)


@pytest.mark.parametrize("aa", ["rand-m9-n1000000000", "augmix-w5000-d1000"])
def test_augmentations_that_would_take_forever_are_refused(aa):
    with pytest.raises(ValueError, match=f"aa '{aa}' is not .* is above 100"):
        RecipeArguments(aa=aa)


@pytest.mark.parametrize(
    "call",
    [
        lambda value: constant_profile(value),
        lambda value: ramped_profile(value),
        lambda value: power_exponent(value),
        lambda value: DiffusionLoss(build_objective(ObjectiveArguments()), class_dropout_prob=value),
        lambda value: DiffusionLoss(build_objective(ObjectiveArguments()), num_buckets=value),
        lambda value: build_processor(3, value),
        lambda value: build_processor(3, 8, crop_pct=value),
        lambda value: TrainingSet([], num_workers=value),
        lambda value: TrainingSet([], num_repeats=value),
        lambda value: TrainingConfig(RunArguments(), validation_steps=value),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 1e30])
def test_functions_refuse_them_too(call, value):
    with pytest.raises(ValueError, match=r"must be|is too large"):
        call(value)


@pytest.mark.parametrize("values", [{"size": {}}, {"size": {"shortest_edge": 0}}, {"crop_size": {"height": "a"}}])
def test_a_processor_without_sizes_is_refused(values):
    base = build_processor(3, 8)
    for name, value in values.items():
        setattr(base, name, value)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        build_processor(3, 16, base=base)
