import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from sdt_diffusion.data import DataArguments
from sdt_diffusion.data.latents.training_data import open_training_data
from sdt_diffusion.sdt.schedulers import DIT_SCHEDULE, noise_scales
from sdt_diffusion.training.objectives import DiffusionLoss, ObjectiveArguments, build_objective
from sdt_diffusion.training.validation import DiffusionValidation, ValidationArguments
from sdt_diffusion.training.velocity_error import (
    LARGEST_SIGMA,
    LEAST_SIGMA,
    VelocityError,
    noise_levels,
    predicted_velocity,
    timestep_of,
)
from tests.training.helpers import build_run

FLOW = FlowMatchEulerDiscreteScheduler(1000)


def ddpm(kind, **options):
    return DDPMScheduler(**DIT_SCHEDULE, prediction_type=kind, **{"clip_sample": False, **options})


@pytest.fixture
def digits():
    return open_training_data(DataArguments(dataset="digits"), None, default_sample_size=8, seed=0)


@pytest.fixture
def mixture():
    """Clean images, noise, noise levels and labels."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(6, 1, 4, 4, generator=generator) * 2 - 1
    sigma = torch.linspace(LEAST_SIGMA, LARGEST_SIGMA, 6, dtype=torch.float64)
    return clean, torch.randn(clean.shape, generator=generator), sigma, torch.zeros(6, dtype=torch.long)


class TestNoiseLevels:
    def test_an_images_levels_do_not_depend_on_the_number_of_images_nor_its_first_one_on_that_of_levels(self):
        assert torch.equal(noise_levels(300, 4)[:100], noise_levels(100, 4))
        assert torch.equal(noise_levels(300, 4)[:, 0], noise_levels(300, 1)[:, 0])

    @pytest.mark.parametrize(("images", "levels"), [(100, 1), (200, 4), (1000, 1)])
    def test_they_are_spread_evenly_over_the_range_also_of_every_tenth_image(self, images, levels):
        for chosen in (noise_levels(images, levels), noise_levels(images, levels)[3::10]):
            position = ((chosen - LEAST_SIGMA) / (LARGEST_SIGMA - LEAST_SIGMA)).flatten().sort().values
            even = (torch.arange(len(position)) + 0.5) / len(position)
            assert (position - even).abs().max() < 4 / len(position)
            assert position.min() >= 0
            assert position.max() < 1


class TestTimestepOf:
    @pytest.mark.parametrize("timestep", [0, 1, 500, 999])
    def test_it_inverts_the_schedules_noise_scales(self, timestep):
        on_image, on_noise = noise_scales(ddpm("epsilon"), timestep)
        sigma = torch.tensor([on_noise / (on_image + on_noise)], dtype=torch.float64)
        assert timestep_of(ddpm("epsilon"), sigma).item() == pytest.approx(timestep, abs=1e-3)

    def test_the_schedule_covers_all_noise_levels_that_are_measured(self):
        ends = timestep_of(ddpm("epsilon"), torch.tensor([LEAST_SIGMA, LARGEST_SIGMA], dtype=torch.float64))
        assert ends[0] > 0
        assert ends[1] < 999


def perfect(scheduler, clean, noise):
    """A model that knows clean images and noise, and predicts what the scheduler's model should."""

    def model(sample, timestep, class_labels, return_dict):
        if scheduler is FLOW:
            return (noise - clean,)
        if scheduler.config.prediction_type == "epsilon":
            return (torch.cat([noise, sample], dim=1),)  # the second half is that of a learned variance
        basis = torch.stack([clean.flatten(1), noise.flatten(1)], dim=2)  # (B, n, 2)
        factors = torch.linalg.lstsq(basis, sample.flatten(1)[..., None]).solution  # (B, 2, 1)
        on_clean, on_noise = factors.reshape(-1, 2, 1, 1, 1).unbind(1)
        return (on_clean * noise - on_noise * clean,)

    return model


class TestPredictedVelocity:
    @pytest.mark.parametrize("scheduler", [FLOW, ddpm("epsilon"), ddpm("v_prediction")], ids=["flow", "noise", "v"])
    def test_a_perfect_model_of_any_objective_predicts_noise_minus_image(self, mixture, scheduler):
        clean, noise, sigma, labels = mixture
        found = predicted_velocity(perfect(scheduler, clean, noise), scheduler, clean, noise, sigma, labels)
        torch.testing.assert_close(found, noise - clean, atol=2e-3, rtol=1e-3)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
    def test_the_best_models_of_gaussian_data_agree_whatever_they_predict(self, mixture, kind):
        """Of x ~ N(0, 1), E[noise - x | mixture] is known in closed form, and so is E[noise | sample]."""
        clean, noise, sigma, labels = mixture
        s = sigma.reshape(-1, 1, 1, 1).float()
        expected = ((1 - s) * clean + s * noise) * (2 * s - 1) / ((1 - s) ** 2 + s**2)

        def model(sample, timestep, class_labels, return_dict):
            alpha_bar = ddpm(kind).alphas_cumprod.double()
            level = np.interp(timestep, range(1000), torch.logit(alpha_bar))
            on_noise = torch.sigmoid(-torch.from_numpy(level)).sqrt().reshape(-1, 1, 1, 1).float()
            return (sample * on_noise if kind == "epsilon" else torch.zeros_like(sample),)

        found = predicted_velocity(model, ddpm(kind), clean, noise, sigma, labels)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)

    def test_the_clean_image_is_clipped_where_the_sampler_clips_it(self, mixture):
        clean, noise, sigma, labels = mixture
        wrong = lambda sample, *rest, **options: (-10 * sample,)  # noqa: E731
        scheduler = DDIMScheduler(**DIT_SCHEDULE, clip_sample=True)
        found = predicted_velocity(wrong, scheduler, clean, noise, sigma, labels)
        s = sigma.reshape(-1, 1, 1, 1).float()
        assert ((1 - s) * clean + s * noise - s * found).abs().max() < 1.001

    def test_a_prediction_that_is_neither_is_refused(self, mixture):
        with pytest.raises(ValueError, match="prediction_type 'sample' is not known"):
            predicted_velocity(lambda sample, *rest, **o: (sample,), ddpm("sample"), *mixture)


def hold_out_digits(digits, count, **options):
    return ValidationArguments(held_out_images=count, **options).hold_out(digits)


class TestVelocityError:
    def test_it_is_the_same_for_all_batch_sizes_and_grows_by_images_without_changing_the_first(self, digits, tmp_path):
        _, images = hold_out_digits(digits, 150)
        measure = VelocityError(FLOW, digits.clean, images, 20)
        found = []
        for batch_size in (4, 8):
            run = build_run(tmp_path, train_batch_size=batch_size)
            run.trained_model = lambda sample, *rest, **options: (0.5 * sample,)
            found.append(measure.errors(run, 150, 2))
            run.release_folder()
        assert torch.equal(*found)
        assert torch.equal(found[0][:20, :1], measure.errors(run, 20, 1))
        assert measure.on_the_way(run)["velocity_error"] == pytest.approx(found[0][:20, 0].mean().item())

    def test_the_error_of_no_velocity_is_its_mean_square(self, digits, tmp_path):
        _, images = hold_out_digits(digits, 150)
        run = build_run(tmp_path)
        run.trained_model = lambda sample, *rest, **options: (torch.zeros_like(sample),)
        values = VelocityError(FLOW, digits.clean, images, 20).at_the_end(run)
        pixels = torch.stack([images.images[int(index)][0] for index in images.indices])
        assert values["final_velocity_error"] == pytest.approx(1 + pixels.square().mean().item(), rel=0.02)
        ranges = [value for key, value in values.items() if "/" in key]
        assert len(ranges) == 10
        assert sum(ranges) / 10 == pytest.approx(values["final_velocity_error"], rel=0.01)

    def test_validation_measures_it_in_place_of_the_loss_and_in_full_at_the_end(self, digits, tmp_path):
        class Pipe:
            scheduler = FLOW

        _, images = hold_out_digits(digits, 100)
        run = build_run(tmp_path, max_train_steps=4)
        run.trained_model = lambda sample, *rest, **options: (sample,)
        loss = DiffusionLoss(build_objective(ObjectiveArguments()))
        validate = DiffusionValidation(Pipe(), loss, digits, images, 0, {}, velocity_error_images=20)
        assert list(validate(run)) == ["velocity_error"]
        run.step = 4
        assert {"velocity_error", "final_velocity_error"} < set(validate(run))


class TestHoldingOut:
    def test_images_of_another_data_set_leave_all_images_to_train_on(self, digits):
        train, held_out = hold_out_digits(digits, 100, held_out_dataset="digits")
        assert train is digits.images
        assert set(held_out.indices) == set(hold_out_digits(digits, 100)[1].indices)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"held_out_dataset": "digits"}, "held_out_dataset needs held_out_images"),
            ({"held_out_images": 10, "velocity_error_images": 11}, "velocity_error_images 11 are more than"),
        ],
    )
    def test_numbers_that_contradict_each_other_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            ValidationArguments(**options)

    def test_more_images_than_there_are_are_refused(self, digits):
        with pytest.raises(ValueError, match="held_out_images 2000 are more than the 1797 images"):
            hold_out_digits(digits, 2000, held_out_dataset="digits")
