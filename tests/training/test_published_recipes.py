"""Each recipe of docs/recipes.md: train_dit.py takes it, and its model has the size and cost that its file states."""

import functools
import re
from pathlib import Path

import pytest
import torch

from sdt_diffusion import SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.training.objectives import build_objective
from sdt_diffusion.training.train_dit import ARGUMENT_TYPES, check_sampler, flops_of
from sdt_diffusion.utils.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "train" / "configs"
PAGE = (ROOT / "docs" / "recipes.md").read_text()
VAE, WIDE, PIXELS = ((4, 32), (32, 16), (3, 256))

#: Recipe -> channels and side of what it learns, images of a step, and parameters in millions, as published.
PUBLISHED = {
    "dit_xl_2": (VAE, 256, 675),
    "sit_xl_2": (VAE, 256, 675),
    "repa_sit_xl_2": (VAE, 256, 675),
    "lightningdit_xl_1": (WIDE, 1024, 675),
    "jit_b_16": (PIXELS, 1024, 131),
}


@functools.cache
def measure(config):
    """Return millions of parameters and 10^9 multiply-adds; DiT's derivatives share a model."""
    with torch.device("meta"):
        model = SDTTransformer2DModel(**dict(config))
    return model.num_parameters() / 1e6, flops_of(model) / 2e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_taken_and_makes_the_published_model(name):
    (channels, side), images, millions = PUBLISHED[name]
    file = CONFIGS / f"{name}.yaml"
    model_args, _, objective_args, optimization, ema, run, *_ = parse_arguments(
        ARGUMENT_TYPES, ["--config", str(file)]
    )
    objective = build_objective(objective_args.resolved(channels * side**2))
    further = objective.model_config(channels)
    config = model_args.config(in_channels=channels, sample_size=side, num_classes=1000, **further)
    parameters, cost = measure(tuple(config.items()))
    assert parameters == pytest.approx(millions, rel=5e-3)
    header = " ".join(line.strip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
    assert f"{parameters:.1f}M parameters, {cost:.1f} G multiply-adds" in header
    assert f"| {parameters:.1f}M, {cost:.1f} G |" in next(
        line for line in PAGE.splitlines() if f"`{name}.yaml`" in line
    )
    assert 8 * run.train_batch_size == images
    assert optimization.adam_weight_decay == 0
    assert (ema.ema_profile, ema.ema_decay) == ("constant", 0.9999)


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_sampler_is_taken(name, make_model):
    (channels, _), *_ = PUBLISHED[name]
    _, _, objective_args, *_, sampler, _, _ = parse_arguments(
        ARGUMENT_TYPES, ["--config", str(CONFIGS / f"{name}.yaml")]
    )
    objective = build_objective(objective_args)
    model = make_model(in_channels=channels, num_layers=1, **objective.model_config(channels))
    pipe = SDTPipeline(model, objective.sampling_scheduler(pixels=False), num_inference_steps=250, uniform_sigmas=True)
    sampler.apply_to(pipe)
    check_sampler(pipe, sampler.settings(pipe))
    if name == "lightningdit_xl_1":
        pipe.scheduler.set_timesteps(sigmas=[0.5])
        assert pipe.scheduler.sigmas[0] == pytest.approx(1 - 0.3 * 0.5 / (1 - 0.7 * 0.5))  # as their code has it
        assert pipe.guider.config.guided_channels == 3


def test_the_page_lists_them_all():
    assert set(re.findall(r"`(\w+)\.yaml`", PAGE)) == set(PUBLISHED)
