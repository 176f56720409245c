import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from sdt_diffusion.attention import SPATIAL_DECAY_VARIANTS
from sdt_diffusion.sdt.steps import set_schedule
from sdt_diffusion.training import objectives
from sdt_diffusion.training.objectives import DiffusionLoss, ObjectiveArguments, build_objective, build_routing
from sdt_diffusion.training.objectives import loss as loss_module
from sdt_diffusion.training.objectives.ddpm import log_probability_of_pixels
from sdt_diffusion.training.objectives.flow import shift_times
from sdt_diffusion.utils.seeding import Draws


def draws_for(n):
    return Draws(seed=0, step=0, rows=slice(0, n), images_per_step=n)


def noised(n=4096, **kwargs):
    clean = torch.full((n, 1, 2, 2), 0.7)
    return clean, build_objective(ObjectiveArguments(**kwargs)).noised(clean, draws_for(n))


class Zero(torch.nn.Module):
    """Predicts zero, and remembers what it was asked."""

    def forward(self, sample, timestep, class_labels, force_drop_ids, return_dict):
        self.timestep, self.dropped = timestep, force_drop_ids
        return (torch.zeros_like(sample),)


def test_flow_lies_on_the_line_from_data_to_noise():
    clean, batch = noised(objective="flow")
    sigma = (batch.timestep / 1000).view(-1, 1, 1, 1)
    noise = batch.target + clean
    torch.testing.assert_close(batch.sample, (1 - sigma) * clean + sigma * noise)
    torch.testing.assert_close(batch.sample - sigma * batch.target, clean)
    assert abs(noise.mean().item()) < 0.05
    assert abs(noise.std().item() - 1) < 0.05


def test_flow_times_are_logit_normal():
    _, batch = noised(objective="flow", logit_mean=-0.5, logit_std=0.8)
    logit = torch.logit(batch.timestep.double() / 1000)
    assert logit.mean().item() == pytest.approx(-0.5, abs=0.05)
    assert logit.std().item() == pytest.approx(0.8, abs=0.05)
    _, uniform = noised(objective="flow", weighting_scheme="none")
    assert (uniform.timestep / 1000).std().item() == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_the_time_shift_is_in_training_and_once_in_sampling(shift):
    (_, plain), (_, shifted) = noised(n=64), noised(n=64, time_shift=shift)
    sigma = plain.timestep.double() / 1000
    # The signal-to-noise ratio (1 - sigma) / sigma falls by the shift.
    expected = (1 - sigma) / sigma / shift
    found = shifted.timestep.double() / 1000
    torch.testing.assert_close((1 - found) / found, expected, rtol=1e-3, atol=1e-6)
    scheduler = build_objective(ObjectiveArguments(time_shift=shift)).sampling_scheduler(pixels=True)
    set_schedule(scheduler, 4, uniform=True)
    uniform = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(scheduler.sigmas, shift * uniform / (1 + (shift - 1) * uniform))


def test_no_shift_changes_nothing():
    for sigma in (torch.rand(1000), torch.rand(1000, dtype=torch.float64)):
        assert torch.equal(shift_times(sigma, 1.0), sigma)


def test_a_time_shift_of_0_follows_from_the_dimension():
    """That of RAE: 768 channels of 16x16 are shifted by about 6.9."""
    args = ObjectiveArguments(time_shift=0.0)
    assert args.resolved(768 * 16 * 16).time_shift == pytest.approx(6.928, abs=1e-3)
    assert args.resolved(4 * 32 * 32).time_shift == 1
    assert ObjectiveArguments(time_shift=2.0).resolved(768 * 16 * 16).time_shift == 2
    with pytest.raises(ValueError, match="time_shift 0 depends on the size of images"):
        build_objective(args)


def test_flow_matches_the_schedulers_noising():
    clean, batch = noised(n=8, objective="flow")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.timesteps = batch.timestep
    scheduler.sigmas = batch.timestep / 1000
    noise = batch.target + clean
    expected = [scheduler.scale_noise(x, t[None], n) for x, t, n in zip(clean, batch.timestep, noise, strict=True)]
    torch.testing.assert_close(batch.sample, torch.stack(expected))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm_recovers_the_data_from_its_target(prediction_type):
    clean, batch = noised(objective="ddpm", prediction_type=prediction_type)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0).float()
    a = alphas_cumprod[batch.timestep].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - a**2).sqrt()
    if prediction_type == "epsilon":
        torch.testing.assert_close(a * clean + sigma * batch.target, batch.sample, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(a * batch.sample - sigma * batch.target, clean, rtol=1e-4, atol=1e-4)
    assert batch.timestep.min() >= 0
    assert batch.timestep.max() <= 999


def test_min_snr_weights():
    for prediction_type in ("epsilon", "v_prediction"):
        _, batch = noised(objective="ddpm", snr_gamma=5.0, prediction_type=prediction_type)
        alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
        snr = (alphas_cumprod / (1 - alphas_cumprod))[batch.timestep]
        expected = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
        torch.testing.assert_close(batch.weight.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", SPATIAL_DECAY_VARIANTS)
@pytest.mark.parametrize(
    "args",
    [
        {"objective": "ddpm", "learn_sigma": True},
        {"objective": "ddpm", "prediction_type": "v_prediction", "snr_gamma": 5.0},
        {"objective": "flow", "routing_ratio": 0.5},
        {"objective": "meanflow", "meanflow_guidance_scale": 1.5},
    ],
    ids=lambda args: "-".join(map(str, args.values())),
)
def test_every_objective_trains_every_decay(make_model, args, variant):
    args = ObjectiveArguments(**args)
    objective = build_objective(args)
    model = make_model(spatial_decay=variant, **objective.model_config(3))
    routing = build_routing(args, model) if variant != "raster" else None  # which is refused: it needs all tokens
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    DiffusionLoss(objective, 0.25, routing=routing)(model, images, torch.arange(4), draws_for(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert name.endswith("to_k.bias") or parameter.grad.abs().max() > 0, name  # which the softmax cancels


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_loss_of_predicting_zero_is_the_targets_power(objective):
    clean = torch.full((4096, 1, 2, 2), 0.7)
    loss = DiffusionLoss(build_objective(ObjectiveArguments(objective=objective)))(
        Zero(), clean, None, draws_for(4096)
    )
    assert loss.item() == pytest.approx(1.0 if objective == "ddpm" else 1 + 0.7**2, rel=0.05)


@pytest.mark.parametrize("args", [{"objective": "flow", "snr_gamma": 5.0}, {"objective": "ddpm", "logit_std": 2.0}])
def test_arguments_of_the_other_objective_are_refused(args):
    with pytest.raises(ValueError, match=f"does not apply to objective {args['objective']}"):
        ObjectiveArguments(**args)


def test_a_prediction_of_another_shape_is_refused():
    class Wide(torch.nn.Module):
        def forward(self, sample, timestep, class_labels, force_drop_ids, return_dict):
            return (torch.cat([sample, sample], 1),)

    with pytest.raises(ValueError, match=r"predicts \(2, 2, 4, 4\), but the target is \(2, 1, 4, 4\)"):
        DiffusionLoss(build_objective(ObjectiveArguments()))(Wide(), torch.zeros(2, 1, 4, 4), None, draws_for(2))


def test_labels_are_dropped_as_often_as_asked():
    model, loss = Zero(), DiffusionLoss(build_objective(ObjectiveArguments()), class_dropout_prob=0.25)
    loss(model, torch.zeros(4096, 1, 2, 2), None, draws_for(4096))
    assert model.dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_the_error_is_logged_by_ranges_of_timesteps(objective):
    model, loss = Zero(), DiffusionLoss(build_objective(ObjectiveArguments(objective=objective)), num_buckets=4)
    clean = torch.full((64, 1, 2, 2), 0.7)
    draws = draws_for(64)
    target = loss.objective.noised(clean, draws_for(64)).target
    loss(model, clean, None, draws)
    errors = target.square().mean(dim=(1, 2, 3))
    expected = {
        f"loss_by_timestep/{low:04d}-{low + 249:04d}": errors[(model.timestep // 250) == low // 250].mean().item()
        for low in (0, 250, 500, 750)
        if ((model.timestep // 250) == low // 250).any()
    }
    found = loss.pop_values()
    assert found == pytest.approx(expected)
    assert loss.pop_values() == {}


def test_the_error_by_timestep_is_of_all_processes_and_of_what_is_finite(monkeypatch):
    loss = DiffusionLoss(build_objective(ObjectiveArguments()), num_buckets=1)
    clean = torch.zeros(8, 1, 2, 2)
    clean[3] = torch.nan
    loss(Zero(), clean, None, draws_for(8))
    noise = build_objective(ObjectiveArguments()).noised(torch.zeros(8, 1, 2, 2), draws_for(8)).target
    expected = noise[[0, 1, 2, 4, 5, 6, 7]].square().mean().item()
    # As if two processes had seen the same.
    monkeypatch.setattr(loss_module, "reduce", lambda sums, reduction: sums * 2)
    found = loss.pop_values()
    assert found["loss_by_timestep/0000-0999"] == pytest.approx(expected)


@pytest.mark.parametrize("args", [{"objective": "flow"}, {"objective": "ddpm", "prediction_type": "v_prediction"}])
def test_saved_scheduler_fits_the_objective_also_after_from_config(args, tmp_path):
    objective = build_objective(ObjectiveArguments(**args))
    objective.sampling_scheduler(pixels=False).save_pretrained(tmp_path)
    if args["objective"] == "flow":
        assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path).config.num_train_timesteps == 1000
        return
    saved = DDIMScheduler.from_pretrained(tmp_path)
    assert saved.config.prediction_type == "v_prediction"
    assert not saved.config.clip_sample
    for name in ("DPMSolverMultistepScheduler", "HeunDiscreteScheduler"):
        swapped = getattr(diffusers, name).from_config(saved.config)
        torch.testing.assert_close(swapped.alphas_cumprod, objective.noise_scheduler.alphas_cumprod)
        assert swapped.config.prediction_type == "v_prediction"
    assert objective.sampling_scheduler(pixels=True).config.clip_sample


def test_another_objective_is_a_class_and_a_line_in_the_table(monkeypatch):
    class Constant:
        options = ()
        num_train_timesteps = 10

        def __init__(self, args):
            self.args = args

        def noised(self, clean, draws):
            return objectives.Noised(clean, draws.uniform() * 10, torch.ones_like(clean), torch.ones(len(clean)))

    monkeypatch.setitem(objectives.OBJECTIVES, "constant", Constant)
    objective = build_objective(ObjectiveArguments(objective="constant"))
    assert DiffusionLoss(objective)(Zero(), torch.zeros(4, 1, 2, 2), None, draws_for(4)) == 1
    with pytest.raises(ValueError, match="snr_gamma does not apply to objective constant"):
        ObjectiveArguments(objective="constant", snr_gamma=5.0)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective must be one of flow, ddpm, meanflow, not 'score'"):
        ObjectiveArguments(objective="score")


class TestLearnedVariance:
    """DiT's hybrid loss: the squared error, and the variational bound for the variance alone."""

    ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)

    @pytest.fixture
    def objective(self):
        return build_objective(ObjectiveArguments(objective="ddpm", learn_sigma=True))

    def normals(self, t, clean, sample, noise, share):
        """Return the posterior and the model's step as distributions."""
        now, before = self.ALPHA_BAR[t], self.ALPHA_BAR[t - 1] if t else torch.ones((), dtype=torch.float64)
        beta, alpha = 1 - now / before, now / before
        variance = beta * (1 - before) / (1 - now)
        predicted = (sample - (1 - now).sqrt() * noise) / now.sqrt()
        means = [
            (before.sqrt() * beta * x + alpha.sqrt() * (1 - before) * sample) / (1 - now) for x in (clean, predicted)
        ]
        if t == 0:
            variance = self.normals(1, clean, sample, noise, share)[0].variance[0, 0, 0, 0]
        log = (share + 1) / 2 * beta.log() + (1 - share) / 2 * variance.log()
        return torch.distributions.Normal(means[0], variance.sqrt()), torch.distributions.Normal(
            means[1], (log / 2).exp()
        )

    @pytest.mark.parametrize("t", [0, 1, 2, 10, 500, 999])
    def test_the_bound_is_that_of_the_distributions(self, objective, t):
        generator = torch.Generator().manual_seed(t)
        clean, noise, error, share = torch.randn(4, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
        clean = (clean * 127.5).round().clamp(-127.5, 127.5) / 127.5
        now = self.ALPHA_BAR[t]
        sample, predicted = now.sqrt() * clean + (1 - now).sqrt() * noise, noise + 0.1 * error
        posterior, model = self.normals(t, clean, sample, predicted, share)
        if t:
            expected = torch.distributions.kl_divergence(posterior, model)
        else:
            half = torch.tensor(1 / 255, dtype=torch.float64)
            above = torch.where(clean > 0.999, 1.0, model.cdf(clean + half))
            expected = -(above - torch.where(clean < -0.999, 0.0, model.cdf(clean - half))).clamp(min=1e-300).log()
        found = objective.variational_bound(clean, sample, torch.tensor([t, t]), predicted, share)
        torch.testing.assert_close(found.double(), expected.mean(dim=(1, 2, 3)) / math.log(2), rtol=2e-3, atol=1e-5)

    def test_there_is_nothing_to_learn_from_a_known_image(self, objective):
        clean, noise = torch.zeros(4, 1, 2, 2), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([1, 10, 500, 999])
        sample = objective.noise_scheduler.add_noise(clean, noise, t)
        bound = objective.variational_bound(clean, sample, t, noise, -torch.ones_like(clean))
        torch.testing.assert_close(bound, torch.zeros(4), rtol=0, atol=1e-4)

    def test_probabilities_of_all_values_sum_to_one(self):
        values = torch.arange(256) / 127.5 - 1
        for mean, std in ((0.0, 0.3), (0.9, 0.02), (-1.5, 1.0)):
            logs = log_probability_of_pixels(values, torch.tensor(mean), torch.tensor(math.log(std)))
            assert logs.exp().sum().item() == pytest.approx(1, abs=1e-4)
        far = torch.tensor(5.0, requires_grad=True)
        log = log_probability_of_pixels(torch.tensor(0.0), far, torch.tensor(-5.0))
        log.backward()
        assert log.item() == pytest.approx(-((5 - 1 / 255) ** 2) / 2 * math.exp(10), rel=1e-3)
        assert far.grad.isfinite()

    def test_the_loss_is_the_error_and_the_bound_which_moves_the_variance_alone(self, objective):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.noise = torch.nn.Parameter(torch.tensor(0.3))
                self.share = torch.nn.Parameter(torch.tensor(0.2))

            def forward(self, sample, timestep, class_labels, force_drop_ids, return_dict):
                return (torch.cat([self.noise * sample, self.share * torch.ones_like(sample)], 1),)

        model, clean = Model(), torch.full((64, 1, 2, 2), 0.7)
        loss = DiffusionLoss(objective)
        loss(model, clean, None, draws_for(64)).backward()
        batch = objective.noised(clean, draws_for(64))
        error = ((0.3 * batch.sample - batch.target) ** 2).mean()
        share = torch.full_like(clean, 0.2)
        bound = objective.variational_bound(clean, batch.sample, batch.timestep, 0.3 * batch.sample, share).mean()
        torch.testing.assert_close(loss(model, clean, None, draws_for(64)), error + bound)
        of_error = (2 * (0.3 * batch.sample - batch.target) * batch.sample).mean()
        torch.testing.assert_close(model.noise.grad, of_error)
        assert model.share.grad.abs() > 1e-4

    def test_the_saved_scheduler_is_dits(self, objective):
        saved = objective.sampling_scheduler(pixels=False)
        saved.set_timesteps(50)
        assert saved.timesteps[:3].tolist() == [999, 979, 958]
        assert (saved.config.variance_type, saved.config.clip_sample) == ("learned_range", False)

    def test_a_model_without_variance_is_refused(self, objective):
        with pytest.raises(ValueError, match=r"predicts \(2, 1, 4, 4\), but .* \(2, 2, 4, 4\).*learn_sigma"):
            DiffusionLoss(objective)(Zero(), torch.zeros(2, 1, 4, 4), None, draws_for(2))

    def test_flows_have_none(self):
        with pytest.raises(ValueError, match="learn_sigma does not apply to objective flow"):
            ObjectiveArguments(learn_sigma=True)

    def test_a_tiny_model_trains_and_samples(self, objective, make_model, make_pipe):
        model = make_model(out_channels=6).train()
        clean, labels = torch.rand(4, 3, 8, 8) * 2 - 1, torch.arange(4)
        DiffusionLoss(objective)(model, clean, labels, draws_for(4)).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
        pipe = make_pipe(objective.sampling_scheduler(pixels=True), transformer=model.eval())
        assert pipe([0], num_inference_steps=2, output_type="pt").images.isfinite().all()
