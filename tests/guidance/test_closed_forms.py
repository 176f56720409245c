"""Every kind of guidance, through the pipeline, on Gaussian classes, for which the guided samples are known."""

import pytest
import torch

from sdt_diffusion import SDTGuidance
from tests.guidance.gaussians import SCHEDULERS, GaussianClasses, ratio, spread_and_mean

KINDS = list(SCHEDULERS)


def pipeline(make_pipe, kind, means, stds, guider=None, **parts):
    model = GaussianClasses(kind, means, stds)
    return make_pipe(SCHEDULERS[kind], transformer=model, id2label=None, guider=guider, **parts)


@pytest.mark.parametrize("kind", KINDS)
def test_classifier_free_guidance_moves_the_mean_and_narrows_the_class(make_pipe, kind):
    pipe = pipeline(make_pipe, kind, means=[0.8, 0.2], stds=[0.5, 0.5])
    std, mean = spread_and_mean(pipe, guidance_scale=2.5)
    assert std == pytest.approx(0.5, rel=0.02)
    assert mean == pytest.approx(0.2 + 2.5 * 0.6, rel=0.02)
    pipe = pipeline(make_pipe, kind, means=[0.0, 0.0], stds=[0.4, 0.8])
    assert spread_and_mean(pipe, guidance_scale=2)[0] == pytest.approx(0.4**2 / 0.8, rel=0.02)
    assert spread_and_mean(pipe, guidance_scale=1)[0] == pytest.approx(0.4, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_autoguidance_takes_the_weak_models_class_or_its_null_class(make_pipe, kind):
    weak = GaussianClasses(kind, means=[0.0, 0.0], stds=[0.6, 1.2])
    for null_class, weak_std in ((False, 0.6), (True, 1.2)):
        guider = SDTGuidance.from_kind("autoguidance", guidance_scale=2, null_class=null_class)
        pipe = pipeline(make_pipe, kind, [0.0, 0.0], [0.4, 9.0], guider, guide_transformer=weak)
        assert spread_and_mean(pipe)[0] == pytest.approx(0.4**2 / weak_std, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_decay_guidance_takes_the_stronger_decay_of_the_class_or_of_the_null_class(make_pipe, kind):
    for null_class, weak_std in ((False, 1.5 * 0.4), (True, 1.5 * 0.8)):
        guider = SDTGuidance.from_kind("decay", guidance_scale=2, decay_factor=1.5, null_class=null_class)
        pipe = pipeline(make_pipe, kind, [0.0, 0.0], [0.4, 0.8], guider)
        assert spread_and_mean(pipe)[0] == pytest.approx(0.4**2 / weak_std, rel=0.02)


@pytest.mark.parametrize("unit", ["sigma", "timestep"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interval_guides_between_its_noise_levels_only(make_pipe, kind, unit):
    if kind == "flow":  # sigma is the share of noise there: sigma / (1 - sigma) is noise over image
        low, high, interval = 0.25 / 0.75, 0.75 / 0.25, (0.25, 0.75) if unit == "sigma" else (250, 750)
    else:
        steps = (300, 600)
        alpha_bar = SCHEDULERS[kind].alphas_cumprod.double()
        low, high = ((1 / alpha_bar[step] - 1).sqrt().item() for step in steps)
        interval = (low, high) if unit == "sigma" else steps
    guider = SDTGuidance(2.0, guidance_interval=interval, interval_unit=unit)
    pipe = pipeline(make_pipe, kind, [0.0, 0.0], [0.4, 0.8], guider)
    expected = 0.4 * ratio(2, 0.4, 0.8, low) / ratio(2, 0.4, 0.8, high)
    assert spread_and_mean(pipe)[0] == pytest.approx(expected, rel=0.02)
    assert abs(expected - 0.4) > 0.03 < abs(expected - 0.4**2 / 0.8)  # neither unguided nor guided everywhere
    sizes = pipe.transformer.batch_sizes
    assert set(sizes) == {2, 4}
    assert sizes.count(4) == pytest.approx(len(sizes) * (0.5 if kind == "flow" else 0.3), abs=2)


@pytest.mark.parametrize("kind", KINDS)
def test_projected_guidance_of_one_pixel_is_no_guidance_as_all_of_it_is_parallel(make_pipe, kind):
    guider = SDTGuidance.from_kind("apg", guidance_scale=3)
    pipe = pipeline(make_pipe, kind, [0.0, 0.0], [0.4, 0.8], guider)
    assert spread_and_mean(pipe)[0] == pytest.approx(0.4, rel=0.02)


def test_one_pass_predicts_both(make_pipe):
    for guider in (None, SDTGuidance(), SDTGuidance.from_kind("apg"), SDTGuidance.from_kind("decay")):
        pipe = pipeline(make_pipe, "epsilon", [0.1, 0.2], [0.4, 0.8], guider)
        pipe([0, 0, 0], num_inference_steps=5, output_type="latent")
        assert pipe.transformer.batch_sizes == [6] * 5
    weak = GaussianClasses("epsilon", [0.1, 0.2], [0.6, 0.8])
    guider = SDTGuidance.from_kind("autoguidance")
    pipe = pipeline(make_pipe, "epsilon", [0.1, 0.2], [0.4, 0.8], guider, guide_transformer=weak)
    pipe([0, 0, 0], num_inference_steps=5, output_type="latent")
    assert pipe.transformer.batch_sizes == weak.batch_sizes == [3] * 5


def test_the_weaker_half_comes_first(make_pipe):
    """As in diffusers, whose FasterCache leaves it out."""
    pipe = pipeline(make_pipe, "flow", [0.0, 0.0, 5.0], [0.4, 0.4, 0.4])
    labels = []
    count = lambda module, args, kwargs: labels.append(kwargs["class_labels"].tolist())  # noqa: E731
    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    pipe([0, 1], num_inference_steps=1, output_type="latent")
    assert labels == [[2, 2, 0, 1]]


def test_what_the_closed_form_says_of_the_pictures_holds_for_diffusers_own_guider(make_pipe):
    from diffusers.guiders import ClassifierFreeGuidance

    pipe = pipeline(make_pipe, "flow", [0.0, 0.0], [0.4, 0.8], ClassifierFreeGuidance(2.0))
    assert spread_and_mean(pipe)[0] == pytest.approx(0.4**2 / 0.8, rel=0.02)
    ours = pipeline(make_pipe, "flow", [0.0, 0.0], [0.4, 0.8], SDTGuidance(2.0))
    noise = torch.randn(4, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    images = [
        each([0] * 4, latents=noise, num_inference_steps=5, output_type="latent").images for each in (pipe, ours)
    ]
    torch.testing.assert_close(*images)


class ContrastedClasses(GaussianClasses):
    """The minimum of contrastive flow matching of weight 0.2, for data of mean 0.7; the null class has no contrast."""

    def forward(self, hidden_states, timestep, class_labels, **options):
        (flow,) = super().forward(hidden_states, timestep, class_labels, **options)
        has_label = (class_labels < self.config.num_classes).view(-1, 1, 1, 1)
        return (torch.where(has_label, (flow - 0.2 * (0 - 0.7)) / (1 - 0.2), flow),)


@pytest.mark.parametrize("mean", [[0.7], [[[0.7]]]])
def test_guidance_without_contrast_is_that_of_the_flow_itself(make_pipe, mean):
    def guided(model, **options):
        guider = SDTGuidance(2.5, **options)
        return spread_and_mean(make_pipe(SCHEDULERS["flow"], transformer=model, id2label=None, guider=guider))

    classes = ("flow", [0.8, 0.2], [0.5, 0.4])
    exact, contrasted = guided(GaussianClasses(*classes)), guided(ContrastedClasses(*classes))
    assert abs(contrasted[0] - exact[0]) > 0.02
    assert abs(contrasted[1] - exact[1]) > 0.02
    found = guided(ContrastedClasses(*classes), contrastive_weight=0.2, contrastive_mean=mean)
    assert found == pytest.approx(exact, rel=1e-4)
