import builtins
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdt_diffusion.training.optimizer import OptimizationArguments, admit_step, build_optimizer, initial_state
from tests.training.helpers import build_run, trained


def build(model):
    return build_optimizer(model, OptimizationArguments(optimizer="adamw8bit", learning_rate=0.01))


def test_without_its_package_it_is_refused_before_the_first_step(monkeypatch):
    def no_bitsandbytes(name, *args):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return import_module(name, *args)

    import_module = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_bitsandbytes)
    with pytest.raises(ValueError, match=r'adamw8bit needs bitsandbytes.*pip install "sdt_diffusion\[bnb\]"'):
        build(nn.Linear(2, 2))


class TestWithBitsandbytes:
    @pytest.fixture(autouse=True)
    def _package(self):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra, for moments of 8 bits")

    def steps(self, admitted):
        torch.manual_seed(0)
        model = nn.Linear(100, 50)
        optimizer = build(model)
        for finite in admitted:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if finite else torch.full_like(parameter, math.nan)
            admit_step(optimizer, torch.tensor(finite))
            optimizer.step()
        return model, optimizer

    def test_a_step_that_is_not_admitted_changes_nothing(self):
        (found, _), (expected, _) = self.steps([False, True, False]), self.steps([True])
        assert torch.equal(found.weight, expected.weight)

    def test_the_initial_state_is_that_of_bitsandbytes(self):
        from bitsandbytes.optim import AdamW8bit

        model = nn.Linear(100, 50)
        optimizer = AdamW8bit(model.parameters())
        for index, parameter in enumerate(model.parameters()):
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
            found, expected = initial_state("adamw8bit", parameter), optimizer.state[parameter]
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(torch.as_tensor(found[key]), torch.as_tensor(value), rtol=0, atol=0)

    def test_a_resumed_run_ends_with_the_same_weights_and_moments(self, tmp_path):
        def run(name, **how):
            return trained(build_run(tmp_path / name, optimization={"optimizer": "adamw8bit"}, **how))

        whole = run("whole")
        run("part", max_train_steps=2)
        part = run("part", resume_from_checkpoint="latest")
        files = [
            path.relative_to(whole.output_dir) for path in whole.output_dir.rglob("checkpoint-6/**/*.safetensors")
        ]
        assert len(files) == 3
        for name in files:
            expected, found = (load_file(run.output_dir / name) for run in (whole, part))
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected), name
