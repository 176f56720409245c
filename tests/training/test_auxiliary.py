"""Further terms of the loss: their formulas, what they need, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch

from sdt_diffusion.training.objectives import (
    ContrastiveLoss,
    DiffusionLoss,
    DirectionLoss,
    DispersiveLoss,
    Noised,
    ObjectiveArguments,
    Predicted,
    SelfAlignmentLoss,
    build_auxiliary_losses,
    build_objective,
)
from sdt_diffusion.utils.seeding import Draws


def draws_for(n, rows=None):
    return Draws(seed=0, step=0, rows=rows or slice(0, n), images_per_step=n)


def predicted(prediction, target=None, dropped=None, **values):
    """What a loss is given, of a prediction and a target."""
    n = len(prediction)
    target = torch.zeros_like(prediction) if target is None else target
    noised = values.pop("noised", Noised(target, torch.zeros(n), target, torch.ones(n)))
    dropped = torch.zeros(n, dtype=torch.bool) if dropped is None else torch.tensor(dropped)
    fields = {"batch": target, "class_labels": torch.zeros(n).long(), "tokens": {}, "draws": draws_for(n), **values}
    return Predicted(noised=noised, prediction=prediction, dropped=dropped, **fields)


class TokenModel(torch.nn.Module):
    """A linear prediction, whose blocks' tokens are multiples of its input's pixels."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, sample, timestep, class_labels, force_drop_ids=None, return_dict=True, block_outputs=()):
        tokens = sample.flatten(2).mT * self.factor  # (B, H*W, C)
        return self.factor * sample, *([[tokens * (i + 1) for i in block_outputs]] if block_outputs else [])


class TestDirectionLoss:
    def test_is_one_minus_the_cosine_of_the_channels(self):
        target = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1).repeat(2, 1, 2, 2)
        turned = torch.tensor([-4.0, 3.0]).reshape(1, 2, 1, 1).repeat(2, 1, 2, 2)
        loss = DirectionLoss(1.0)
        for prediction, expected in ((0.1 * target, 0), (turned, 1), (-target, 2), (target + turned, 1 - 0.5**0.5)):
            assert loss(predicted(prediction, target)).item() == pytest.approx(expected, abs=1e-6)

    def test_a_longer_prediction_is_no_better(self):
        target = torch.randn(2, 3, 4, 4)
        prediction = torch.randn(2, 3, 4, 4, requires_grad=True)
        DirectionLoss(1.0)(predicted(prediction, target)).backward()
        assert prediction.grad.abs().max() > 1e-3
        # The gradient has no part along the prediction.
        torch.testing.assert_close((prediction.grad * prediction).sum(1), torch.zeros(2, 4, 4), rtol=0, atol=1e-6)


class TestContrastiveLoss:
    def test_is_minus_the_error_to_the_neighbors_target(self):
        prediction = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1)
        target = torch.tensor([0.0, 10.0, 20.0, 30.0]).reshape(4, 1, 1, 1)
        loss = ContrastiveLoss(0.05)
        assert loss(predicted(prediction, target)).item() == -(9**2 + 2**2 + 27**2 + 16**2) / 4
        dropped = [True, False, False, True]
        assert loss(predicted(prediction, target, dropped)).item() == -(2**2 + 27**2) / 4

    def test_its_minimum_is_moved_away_from_the_mean_except_without_a_label(self):
        """(v - w m) / (1 - w), of a model that gives one number to all images of a class."""
        torch.manual_seed(0)
        weight, n = 0.05, 4096
        target = torch.randn(n, 1, 1, 1, dtype=torch.float64) + 3
        dropped = torch.arange(n) % 4 == 0
        values = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        prediction = values[dropped.long()].reshape(n, 1, 1, 1)
        term = ContrastiveLoss(weight)(predicted(prediction, target, dropped.tolist()))
        loss = (prediction - target).square().mean() + weight * term
        (gradient,) = torch.autograd.grad(loss, values, create_graph=True)
        curvature = torch.autograd.grad(gradient.sum(), values)[0]  # neither value bends the other's loss
        minimum = (-gradient / curvature).detach()  # the loss is a sum of parabolas
        v = [target[~dropped].mean().item(), target[dropped].mean().item()]
        neighbors = target.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)[~dropped].mean().item()
        assert minimum[0].item() == pytest.approx((v[0] - weight * neighbors) / (1 - weight))
        assert minimum[1].item() == pytest.approx(v[1])

    def test_without_weight_the_loss_is_the_squared_error(self):
        objective, clean = build_objective(ObjectiveArguments()), torch.randn(4, 2, 4, 4)
        plain = DiffusionLoss(objective)(TokenModel(), clean, None, draws_for(4))
        terms = [ContrastiveLoss(0.0), DirectionLoss(0.0)]
        assert DiffusionLoss(objective, auxiliary=terms)(TokenModel(), clean, None, draws_for(4)) == plain


class TestDispersiveLoss:
    def test_is_the_log_of_the_mean_similarity(self):
        """Of two images at a mean squared distance of 9, and of one that is both."""
        tokens = torch.zeros(4, 2, 3)
        tokens[1] = 3.0
        tokens[2:] = 7.0
        values = predicted(torch.zeros(4, 1, 1, 1), tokens={2: tokens})
        loss = DispersiveLoss(0.5, block=2, temperature=4.5, num_images=2)
        expected = [math.log((1 + math.exp(-9 / 4.5)) / 2), 0.0]
        assert loss(values).item() == pytest.approx(sum(expected) / 2, abs=1e-5)

    def test_it_is_that_of_all_pairs(self):
        torch.manual_seed(0)
        tokens = (torch.randn(8, 5, 4) + 100).requires_grad_()  # far from 0: the distances lose no digits
        loss = DispersiveLoss(0.5, block=0, num_images=8)(predicted(torch.zeros(8, 1, 1, 1), tokens={0: tokens}))
        exact = tokens.double().flatten(1)
        distance = (exact[:, None] - exact).square().mean(-1)
        expected = (-distance / 0.5).exp().mean().log()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
        gradient, exact_gradient = (torch.autograd.grad(x, tokens)[0] for x in (loss, expected))
        torch.testing.assert_close(gradient, exact_gradient, rtol=1e-3, atol=1e-6)

    def test_images_that_are_the_same_have_a_finite_gradient(self):
        tokens = torch.ones(4, 2, 3, requires_grad=True)
        loss = DispersiveLoss(0.5, block=0, num_images=4)(predicted(torch.zeros(4, 1, 1, 1), tokens={0: tokens}))
        loss.backward()
        assert loss.item() == pytest.approx(0)
        assert tokens.grad.isfinite().all()


class TestSelfAlignmentLoss:
    def terms(self, time=0.2):
        torch.manual_seed(0)
        return SelfAlignmentLoss(0.2, width=2, block=0, teacher_block=3, most_time=time)

    def test_the_teacher_sees_the_same_image_and_noise_earlier(self):
        seen = {}

        def teacher(sample, timestep, class_labels, force_drop_ids, block_outputs, return_dict):
            seen.update(sample=sample, timestep=timestep, dropped=force_drop_ids, blocks=block_outputs)
            return sample, (torch.zeros(64, 16, 2),)

        clean = torch.randn(64, 2, 4, 4)
        noised = build_objective(ObjectiveArguments()).noised(clean, draws_for(64))
        tokens = {0: torch.randn(64, 16, 2)}
        values = predicted(clean, noised=noised, tokens=tokens, teacher=teacher, dropped=[True] + 63 * [False])
        self.terms()(values)
        earlier, noise = (seen["timestep"] / 1000).reshape(-1, 1, 1, 1), noised.target + clean
        torch.testing.assert_close(seen["sample"], (1 - earlier) * clean + earlier * noise, rtol=1e-5, atol=1e-5)
        difference = (noised.timestep - seen["timestep"]) / 1000
        assert difference.min() >= -1e-6
        assert 0.15 < difference.max() <= 0.2
        assert seen["timestep"].min() >= 0
        assert (seen["blocks"], seen["dropped"].tolist()) == ((3,), [True] + 63 * [False])

    def test_is_the_smooth_distance_of_the_heads_output(self):
        values, tokens = torch.zeros(4, 2, 4, 4), torch.randn(4, 16, 2)
        loss = self.terms()
        features = loss.head(tokens).detach() + 0.3  # far: the absolute distance less beta / 2
        shared = {"tokens": {0: tokens}, "teacher": lambda *args, **kwargs: (None, (features,))}
        assert loss(predicted(values, **shared)).item() == pytest.approx(0.3 - 0.05 / 2, abs=1e-5)
        features -= 0.28  # near: the square over 2 beta
        assert loss(predicted(values, **shared)).item() == pytest.approx(0.02**2 / 0.1, abs=1e-5)

    def test_without_a_teacher_it_says_what_it_needs(self):
        with pytest.raises(ValueError, match="Self-alignment needs a teacher"):
            self.terms()(predicted(torch.zeros(4, 2, 4, 4), tokens={0: torch.zeros(4, 16, 2)}))


def all_terms(num_images=4):
    terms = [DirectionLoss(1.0), ContrastiveLoss(0.05), DispersiveLoss(0.5, 1, num_images=num_images)]
    torch.manual_seed(0)
    return [*terms, SelfAlignmentLoss(0.2, width=2, block=0, teacher_block=1)]


def loss_of(*terms, model):
    loss = DiffusionLoss(build_objective(ObjectiveArguments()), class_dropout_prob=0.3, auxiliary=terms)
    loss.teacher = model
    return loss


def test_terms_are_added_by_their_weights_and_logged_by_their_names():
    model, clean = TokenModel(), torch.randn(8, 2, 4, 4)
    terms = all_terms()
    total = loss_of(*terms, model=model)
    value = total(model, clean, torch.zeros(8).long(), draws_for(8))
    plain = loss_of(model=model)(model, clean, torch.zeros(8).long(), draws_for(8))
    logged = {key: value for key, value in total.pop_values().items() if not key.startswith("loss_by_timestep")}
    assert list(logged) == ["direction_loss", "contrastive_loss", "dispersive_loss", "self_alignment_loss"]
    expected = plain + sum(term.weight * logged[term.name] for term in terms)
    torch.testing.assert_close(value, expected)
    assert total.pop_values() == {}
    value.backward()
    assert model.factor.grad.isfinite()
    assert all(parameter.grad.abs().max() > 0 for parameter in total.heads.parameters())
    assert list(total.heads) == ["self_alignment_loss"]


def test_a_value_that_is_not_finite_is_not_logged():
    model = TokenModel()
    loss = loss_of(DirectionLoss(1.0), model=model)
    loss(model, torch.full((2, 2, 4, 4), torch.nan), torch.zeros(2).long(), draws_for(2))
    assert loss.pop_values() == {}


def test_the_held_out_error_knows_no_terms():
    model, clean = TokenModel(), torch.randn(8, 2, 4, 4)
    _, errors = loss_of(*all_terms(), model=model).errors(model, clean, None, draws_for(8))
    _, expected = DiffusionLoss(build_objective(ObjectiveArguments())).errors(model, clean, None, draws_for(8))
    assert torch.equal(errors, expected)


def test_a_batch_in_parts_has_the_same_loss():
    """As several processes, or several batches of a step, have it."""
    model, clean, labels = TokenModel(), torch.randn(8, 2, 4, 4), torch.zeros(8).long()
    whole = loss_of(*all_terms(), model=model)(model, clean, labels, draws_for(8))
    parts = [
        loss_of(*all_terms(), model=model)(model, clean[rows], labels[rows], draws_for(8, rows))
        for rows in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)


def model_of(**config):
    values = {"num_layers": 12, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, **config}
    return SimpleNamespace(config=SimpleNamespace(**values))


def built(model=None, batch=8, use_ema=True, **args):
    return build_auxiliary_losses(ObjectiveArguments(**args), model or model_of(), batch, use_ema)


def test_terms_are_built_by_their_weights():
    weights = {"direction_loss_weight": 1.0, "contrastive_weight": 0.05, "dispersive_weight": 0.5}
    terms = built(**weights, self_alignment_weight=0.2, dispersive_images=4)
    assert [type(term) for term in terms] == [DirectionLoss, ContrastiveLoss, DispersiveLoss, SelfAlignmentLoss]
    assert [term.weight for term in terms] == [1.0, 0.05, 0.5, 0.2]
    assert [term.blocks for term in terms] == [(), (), (2,), (3,)]  # after 3 and 4 of 12 blocks
    assert terms[3].teacher_block == 7
    assert terms[3].head(torch.zeros(1, 4, 16)).shape == (1, 4, 16)
    assert built() == []
    (shallow,) = built(model_of(num_layers=1), dispersive_weight=0.5, dispersive_images=8)
    assert shallow.blocks == (0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dispersive_block": 2}, "dispersive_block needs dispersive_weight"),
        ({"dispersive_temperature": 1.0}, "dispersive_temperature needs dispersive_weight"),
        ({"self_alignment_time": 0.1}, "self_alignment_time needs self_alignment_weight"),
        ({"dispersive_weight": 0.5}, "dispersive_images needs a train_batch_size that is a multiple of 32, not 8"),
        ({"contrastive_weight": 0.05, "batch": 7}, "contrastive_weight, .* train_batch_size .* multiple of 2, not 7"),
        (
            {"dispersive_weight": 0.5, "dispersive_images": 8, "dispersive_block": 13},
            "dispersive_block 13 is beyond the model's num_layers, 12",
        ),
        ({"self_alignment_weight": 0.2, "use_ema": False}, "self_alignment_weight needs use_ema"),
        (
            {"self_alignment_weight": 0.2, "self_alignment_block": 9},
            "self_alignment_block 9 is beyond self_alignment_teacher_block 8",
        ),
        (
            {"direction_loss_weight": 1.0, "model": model_of(in_channels=1)},
            "direction_loss_weight needs .* several channels, not in_channels 1",
        ),
        ({"contrastive_weight": 1.0}, "contrastive_weight must be"),
        *[
            ({"objective": "ddpm", name: 0.5}, f"{name} does not apply to objective ddpm")
            for name in ("time_shift", "direction_loss_weight", "contrastive_weight", "self_alignment_weight")
        ],
    ],
)
def test_what_does_not_fit_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        built(**values)


def test_ddpm_disperses_too():
    model, clean = TokenModel(), torch.randn(4, 2, 4, 4)
    (term,) = built(batch=4, objective="ddpm", dispersive_weight=0.5, dispersive_images=4)
    loss = DiffusionLoss(build_objective(ObjectiveArguments(objective="ddpm")), auxiliary=[term])
    assert loss(model, clean, None, draws_for(4)).isfinite()
