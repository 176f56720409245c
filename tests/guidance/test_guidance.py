"""The formulas of `SDTGuidance`, and what it refuses."""

import math

import diffusers
import pytest
import torch

from sdt_diffusion import SDTGuidance
from sdt_diffusion.sdt import GUIDANCE_KINDS
from sdt_diffusion.sdt.guidance import clean_image_of, sigma_at
from tests.guidance.gaussians import SCHEDULERS


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def combine(guider, latents, predictions, kind="flow", timesteps=(600,)):
    """Return what the guider makes of the two predictions at the last of some timesteps."""
    guider.start_run(SCHEDULERS[kind], timesteps)
    for step, timestep in enumerate(timesteps):
        guider.set_state(step, len(timesteps), timestep)
        labels = torch.zeros(3, dtype=torch.long)
        branches = guider.prepare_inputs({"latents": latents, "class_labels": (labels, labels)})
        for branch, prediction in zip(branches, predictions, strict=True):
            branch.noise_pred = prediction
        combined = guider(branches).pred
    return combined


def test_guidance_extrapolates(inputs):
    latents, cond, weak = inputs
    torch.testing.assert_close(combine(SDTGuidance(3.0), latents, (cond, weak)), weak + 3 * (cond - weak))


def test_three_channels_are_dits(inputs):
    latents, cond, weak = inputs
    guided = combine(SDTGuidance.from_kind("cfg_3channels", guidance_scale=4), latents, (cond, weak))
    torch.testing.assert_close(guided[:, :3], (weak + 4 * (cond - weak))[:, :3])
    assert torch.equal(guided[:, 3:], cond[:, 3:])


@pytest.mark.parametrize("kind", GUIDANCE_KINDS)
def test_equal_predictions_stay_as_they_are(inputs, kind):
    latents, cond, _ = inputs
    torch.testing.assert_close(combine(SDTGuidance.from_kind(kind, guidance_scale=7), latents, (cond, cond)), cond)


def test_rescaling_gives_back_the_standard_deviation(inputs):
    latents, cond, weak = inputs
    spread = lambda x: x.std(dim=(1, 2, 3))  # noqa: E731
    plain = combine(SDTGuidance(3.0), latents, (cond, weak))
    full = combine(SDTGuidance(3.0, guidance_rescale=1.0), latents, (cond, weak))
    torch.testing.assert_close(spread(full), spread(cond))
    some = combine(SDTGuidance(3.0, guidance_rescale=0.7), latents, (cond, weak))
    torch.testing.assert_close(some, 0.7 * full + 0.3 * plain)
    assert (spread(plain) > 1.5 * spread(cond)).all()


@pytest.mark.parametrize("options", [{}, {"parallel_weight": 0.0}])
def test_rescaling_leaves_constant_predictions_as_they_are(inputs, options):
    latents, cond, weak = inputs
    guided = SDTGuidance(3.0, guidance_rescale=0.7, **options)
    for value in (0.0, 2.0):
        predictions, no_latents = (torch.full_like(cond, value), torch.zeros_like(cond)), torch.zeros_like(latents)
        found = combine(guided, no_latents, predictions)
        torch.testing.assert_close(found, combine(SDTGuidance(3.0, **options), no_latents, predictions))
    mixed = combine(guided, latents, (torch.cat([cond[:2], 0 * cond[2:]]), torch.cat([weak[:2], 0 * weak[2:]])))
    assert torch.equal(mixed[:2], combine(guided, latents, (cond, weak))[:2])  # of one image, not of its batch


def clean(kind, latents, prediction, timestep):
    on_latents, factor = clean_image_of(SCHEDULERS[kind], timestep)
    return on_latents * latents + factor * prediction


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_projected_guidance_is_that_of_the_paper_on_clean_images(inputs, kind):
    latents, cond, weak = inputs
    scale, eta, momentum, threshold, timesteps = 4.0, 0.25, -0.5, 12.0, (800, 600)
    guider = SDTGuidance(scale, parallel_weight=eta, momentum=momentum, norm_threshold=threshold)
    guided = combine(guider, latents, (cond, weak), kind, timesteps)

    difference = 0
    for timestep in timesteps:
        d_cond, d_weak = (clean(kind, latents, prediction, timestep) for prediction in (cond, weak))
        difference = d_cond - d_weak + momentum * difference
    for row in range(3):
        update, target = difference[row].flatten(), d_cond[row].flatten()
        update = update * min(1, threshold / update.norm().item())
        parallel = (update @ target) / (target @ target) * target
        expected = target + (scale - 1) * (update - parallel + eta * parallel)
        actual = clean(kind, latents, guided, timesteps[-1])[row].flatten()
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_projection_that_keeps_all_of_a_difference_is_plain_guidance(inputs, kind):
    latents, cond, weak = inputs
    guider = SDTGuidance(3.0, norm_threshold=1e6)  # computed as a projection, but nothing is left out
    expected = weak + 3 * (cond - weak)
    torch.testing.assert_close(combine(guider, latents, (cond, weak), kind), expected, rtol=1e-9, atol=1e-9)


def test_clean_images_and_noise_levels_are_those_of_training():
    x, noise = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.3, dtype=torch.float64)
    for kind, scheduler in SCHEDULERS.items():
        for timestep in (1, 500, 999):
            sigma = sigma_at(scheduler, timestep)
            if kind == "flow":
                a, s, prediction = 1 - sigma, sigma, noise - x
                assert sigma == timestep / 1000
            else:
                a = scheduler.alphas_cumprod[timestep].double().sqrt().item()
                s = math.sqrt(1 - a**2)
                prediction = noise if kind == "epsilon" else a * noise - s * x
                assert sigma == pytest.approx(s / a)
            on_latents, factor = clean_image_of(scheduler, timestep)
            assert on_latents * (a * x + s * noise) + factor * prediction == pytest.approx(x.item(), rel=1e-5)


def test_schedules_may_end_at_pure_noise():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert sigma_at(scheduler, 999) == math.inf
    assert clean_image_of(scheduler, 999) == (0, -1)
    SDTGuidance(guidance_interval=(0.2, 5.0)).check_interval(scheduler)


def test_only_an_interval_needs_known_noise_levels():
    SDTGuidance().check_interval(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match="The noise levels of EDMEulerScheduler are not known here"):
        SDTGuidance(guidance_interval=(0.2, 0.8)).check_interval(diffusers.EDMEulerScheduler())


def test_far_heads_are_the_half_that_decays_least(make_model):
    factors = lambda **config: (  # noqa: E731
        SDTGuidance.from_kind("decay", decay_factor=9, far_heads_only=True)
        .decay_scale(make_model(num_layers=1, attention_head_dim=8, **config).config)
        .tolist()
    )
    assert factors(num_attention_heads=4) == [1, 1, 9, 9]
    assert factors(num_attention_heads=3) == [1, 9, 9]
    assert factors(num_attention_heads=4, decay_initial_value=8.0, decay_heads_range=-6.0) == [9, 9, 1, 1]
    assert SDTGuidance.from_kind("decay").decay_scale(make_model().config).tolist() == [4, 4]


def test_guiders_survive_saving_and_their_copies_too(tmp_path):
    guider = SDTGuidance.from_kind("decay", guidance_scale=2, guidance_interval=(0.2, 0.8), guidance_rescale=0.3)
    guider.save_pretrained(tmp_path)
    loaded = SDTGuidance.from_pretrained(tmp_path)
    assert loaded.describe() == guider.describe() == "decay times 4, rescaled 0.3, at sigma 0.2 to 0.8"
    assert loaded.guidance_scale == 2
    assert (
        loaded.new(guidance_scale=3, decay_factor=1).describe() == "decay times 1, rescaled 0.3, at sigma 0.2 to 0.8"
    )


def test_diffusers_does_not_say_of_ours_that_guiders_are_experimental(caplog):
    SDTGuidance()
    assert caplog.records == []
    diffusers.ClassifierFreeGuidance()
    assert "experimental" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
        ({"guidance_scale": "2"}, "guidance_scale must be a number"),
        ({"guidance_interval": (0.8, 0.2)}, "the lower one first"),
        ({"guidance_interval": (0.5, 0.5)}, "the lower one first"),
        ({"guidance_interval": (math.nan, 0.5)}, "guidance_interval must be a finite number"),
        ({"guidance_interval": (-0.1, 0.5)}, "guidance_interval must be at least 0"),
        ({"guidance_interval": (0.1, 0.5, 0.9)}, "guidance_interval must be two numbers"),
        ({"guidance_interval": 0.5}, "guidance_interval must be two numbers"),
        ({"interval_unit": "steps"}, "interval_unit must be sigma or timestep"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be at least 0 and at most 1"),
        ({"guided_channels": 0}, "guided_channels must be at least 1"),
        ({"guided_channels": 1.5}, "guided_channels must be a whole number"),
        ({"momentum": 1.0}, "momentum must be more than -1 and less than 1"),
        ({"norm_threshold": -1.0}, "norm_threshold must be at least 0"),
        ({"contrastive_weight": 1.0, "contrastive_mean": [0.0]}, "contrastive_weight must be .* less than 1"),
        ({"contrastive_weight": 0.05}, "contrastive_weight and contrastive_mean need each other"),
        ({"contrastive_mean": [0.0]}, "contrastive_weight and contrastive_mean need each other"),
        ({"contrastive_weight": 0.05, "contrastive_mean": [math.nan]}, "contrastive_mean must be finite"),
        ({"contrastive_weight": 0.05, "contrastive_mean": 0.5}, "contrastive_mean must be finite"),
        ({"contrastive_weight": 0.05, "contrastive_mean": ["a"]}, "contrastive_mean must be finite"),
        (
            {"contrastive_weight": 0.05, "contrastive_mean": [0.0], "null_class": False, "decay_factor": 2.0},
            "not for guide_model or decay_factor",
        ),
        ({"decay_factor": -2.0}, "decay_factor must be at least 0"),
        ({"decay_factor": math.inf}, "decay_factor must be a finite number"),
        ({"null_class": 1}, "null_class must be true or false"),
        ({"guide_model": True, "decay_factor": 2.0}, "guide_model and decay_factor contradict each other"),
        ({"far_heads_only": True}, "far_heads_only is for decay guidance"),
        ({"null_class": False}, "Nothing makes the weaker prediction weaker"),
    ],
)
def test_options_that_make_no_guidance_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SDTGuidance(**options)


def test_unknown_kinds_and_options_are_refused():
    with pytest.raises(ValueError, match="Unknown kind of guidance 'slg': choose one of cfg, cfg_3channels, apg"):
        SDTGuidance.from_kind("slg")
    with pytest.raises(TypeError, match="scale"):
        SDTGuidance.from_kind("cfg", scale=2)


def test_contrast_is_taken_back_for_the_channels_of_flows_only(inputs):
    latents, cond, weak = inputs
    options = {"contrastive_weight": 0.05, "contrastive_mean": [0.1, 0.2, 0.3, 0.4]}
    mean = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None].double()
    expected = weak + 2 * ((0.95 * cond - 0.05 * mean) - weak)
    torch.testing.assert_close(combine(SDTGuidance(2.0, **options), latents, (cond, weak)), expected)
    with pytest.raises(ValueError, match="contrastive_weight is for flows, and DPMSolverMultistepScheduler"):
        combine(SDTGuidance(2.0, **options), latents, (cond, weak), "epsilon")
    with pytest.raises(ValueError, match=r"contrastive_mean of shape \(1, 1, 1\) does not fit"):
        combine(SDTGuidance(2.0, contrastive_weight=0.05, contrastive_mean=[0.0]), latents, (cond, weak))
