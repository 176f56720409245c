import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sdt_diffusion.data import DataArguments
from sdt_diffusion.data.latents.training_data import open_training_data
from sdt_diffusion.training.gate_statistics import GateStatistics
from sdt_diffusion.training.validation import ValidationArguments
from sdt_diffusion.training.velocity_error import VelocityError
from tests.training.helpers import build_run

EXPONENTS = (2.0, 5.0)  # of two heads, over the default range


@pytest.fixture(scope="module")
def measure():
    digits = open_training_data(DataArguments(dataset="digits"), None, default_sample_size=8, seed=0)
    _, images = ValidationArguments(held_out_images=64).hold_out(digits)
    return VelocityError(FlowMatchEulerDiscreteScheduler(1000), digits.clean, images, 64)


@pytest.fixture
def run_of(tmp_path):
    """A function that returns a run whose model is not at its start, where gates have no effect."""

    def build(spatial_decay, noise=0.05, **config):
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "in_channels": 1}
        model = {**sizes, "num_classes": 10, "spatial_decay": spatial_decay, **config}
        run = build_run(tmp_path, model=model)
        with torch.no_grad():
            for parameter in run.trained_model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        return run

    return build


@pytest.mark.parametrize("spatial_decay", ["context", "fixed"])
def test_a_new_model_decays_as_rmt_everywhere(measure, run_of, spatial_decay):
    values = GateStatistics(measure)(run_of(spatial_decay, noise=0.0))
    for head, exponent in enumerate(EXPONENTS):
        rate = -math.log(1 - 2**-exponent)
        for name in ("gate_rate", "gate_rate_low_noise", "gate_rate_high_noise"):
            assert values[f"{name}/0.{head}"] == pytest.approx(rate, rel=1e-5)
        assert values[f"gate_spread/0.{head}"] < 1e-5
    assert any(key.startswith("gate_gradient") for key in values) == (spatial_decay == "context")


def test_a_trained_one_decays_differently_from_patch_to_patch(measure, run_of):
    values = GateStatistics(measure)(run_of("context"))
    assert values["gate_spread/0.0"] > 0.01
    assert values["gate_rate_low_noise/0.0"] != values["gate_rate_high_noise/0.0"]


def test_without_gates_there_is_nothing_to_describe(measure, run_of):
    assert GateStatistics(measure)(run_of("none")) == {}


def test_the_gradient_is_that_of_the_error_and_leaves_no_trace(measure, run_of):
    run = run_of("context", noise=0.3)
    model = run.trained_model
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    values = GateStatistics(measure)(run)
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    log_alpha, step, slopes = model.transformer_blocks[0].attn.gate.log_alpha, 0.02, []
    for head in range(2):
        errors = []
        for change in (step, -step):
            with torch.no_grad():
                log_alpha[head] += change
            errors.append(measure.errors(run, 64, 1).mean().item())
            with torch.no_grad():
                log_alpha[head] -= change
        slopes.append((errors[0] - errors[1]) / (2 * step))
    assert values["gate_gradient/0.log_alpha"] == pytest.approx(math.hypot(*slopes), rel=0.02)


def test_they_need_held_out_images():
    with pytest.raises(ValueError, match="gate_statistics needs velocity_error_images"):
        ValidationArguments(gate_statistics=True)
