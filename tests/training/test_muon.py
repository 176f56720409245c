import math

import pytest
import torch
from torch import nn
from torch.optim import Muon as TorchMuon

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.sdt_h.modeling_sdt_h import SDTHForImageClassification
from sdt_diffusion.training.muon import Muon, muon_matrices, orthogonalize
from sdt_diffusion.training.optimizer import OptimizationArguments, admit_step, build_optimizer
from tests.conftest import TINY

SHAPES = [(24, 24), (16, 40), (40, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_directions_stay_and_singular_values_become_about_one(shape, dtype, tolerance):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    values = s / s.norm()
    for _ in range(5):  # what the iteration does to singular values, as a polynomial of numbers
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert ((values > 0.65) & (values < 1.25)).all()
    found = orthogonalize(matrix.float(), dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), u @ values.diag() @ vt, rtol=0, atol=tolerance)
    # Close to the polar factor: the cosine between the two is that of the singular values and ones.
    assert (found.double() * (u @ vt)).sum() / found.double().norm() / math.sqrt(len(s)) > 0.97


def test_stacked_matrices_are_orthogonalized_one_by_one():
    matrices = torch.randn(3, 8, 20)
    together = orthogonalize(matrices, torch.float32)
    for matrix, found in zip(matrices, together, strict=True):
        torch.testing.assert_close(found, orthogonalize(matrix, torch.float32))


def moved(optimizer_of, values, gradients):
    parameter = nn.Parameter(values.clone())
    optimizer = optimizer_of(parameter)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def ours(parameter, num_matrices=1):
    group = {"params": [parameter], "num_matrices": num_matrices, "lr": 0.01, "weight_decay": 0.1}
    return Muon([group], momentum=0.9, dtype=torch.bfloat16)


def of_torch(parameter):
    return TorchMuon([parameter], lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_matrix_moves_as_by_torch(shape):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape), torch.randn(4, *shape)
    found, expected = moved(ours, values, gradients), moved(of_torch, values, gradients)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * (expected - values).abs().max().item())


def test_a_parameter_that_stacks_matrices_moves_as_the_matrices_would():
    torch.manual_seed(0)
    values, gradients = torch.randn(30, 12), torch.randn(2, 30, 12)
    found = moved(lambda parameter: ours(parameter, 3), values, gradients)
    chunks = zip(values.chunk(3), gradients.chunk(3, dim=1), strict=True)
    torch.testing.assert_close(found, torch.cat([moved(ours, *chunk) for chunk in chunks]), rtol=0, atol=1e-5)


def test_matrices_of_blocks_are_moved_and_nothing_else():
    model = SDTTransformer2DModel(**{**TINY, "num_layers": 1}, activation_fn="swiglu")
    assert muon_matrices(model) == {
        "transformer_blocks.0.norm1.linear.weight": 6,
        "transformer_blocks.0.attn.to_q.weight": 1,
        "transformer_blocks.0.attn.to_k.weight": 1,
        "transformer_blocks.0.attn.to_v.weight": 1,
        "transformer_blocks.0.attn.to_out.0.weight": 1,
        "transformer_blocks.0.ff.net.0.proj.weight": 2,
        "transformer_blocks.0.ff.net.2.weight": 1,
    }


@pytest.mark.parametrize(
    ("of", "name", "layers", "a_block"),
    [(SDTTransformer2DModel, "SDT-S/2", 12, 7), (SDTHForImageClassification, "SDT-H-T", 14, 6)],
)
def test_those_of_presets(of, name, layers, a_block):
    with torch.device("meta"):
        model = of.from_preset(name)
    assert len(muon_matrices(model)) == layers * a_block
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, count in muon_matrices(model).items():
        assert len(shapes[name]) == 2
        assert shapes[name][0] % count == 0


def test_each_parameter_belongs_to_one_group():
    model = SDTTransformer2DModel(**TINY)
    optimizer = build_optimizer(model, OptimizationArguments(optimizer="muon", learning_rate=0.1, muon_lr=0.02))
    groups = [
        (group["rule"], group["lr"], parameter) for group in optimizer.param_groups for parameter in group["params"]
    ]
    assert len(groups) == len({id(parameter) for *_, parameter in groups}) == len(list(model.parameters()))
    assert {(rule, lr) for rule, lr, _ in groups} == {("adamw", 0.1), ("muon", 0.02)}


def test_a_model_without_matrices_to_move_is_refused():
    with pytest.raises(ValueError, match="optimizer muon has nothing to move"):
        build_optimizer(nn.Linear(2, 2), OptimizationArguments(optimizer="muon"))


def test_what_is_muons_needs_muon():
    with pytest.raises(ValueError, match="muon_lr needs optimizer muon, not adamw"):
        OptimizationArguments(muon_lr=0.1)


def test_a_step_that_is_not_admitted_leaves_weights_and_momentum_as_they_are():
    def steps(admitted):
        torch.manual_seed(0)
        model = SDTTransformer2DModel(**TINY)
        optimizer = build_optimizer(model, OptimizationArguments(optimizer="muon", learning_rate=0.1))
        for finite in admitted:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if finite else torch.full_like(parameter, math.nan)
            admit_step(optimizer, torch.tensor(finite))
            optimizer.step()
        states = [optimizer.state[parameter] for parameter in model.parameters()]
        return [*model.parameters(), *(value for state in states for value in state.values())]

    for found, expected in zip(steps([False, True, False, False, True]), steps([True, True]), strict=True):
        assert torch.equal(found, expected)
