import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdt_diffusion import SDTPipeline
from sdt_diffusion.data import DataArguments
from sdt_diffusion.data.latents.training_data import open_training_data
from sdt_diffusion.evaluation.cost import count_cost
from sdt_diffusion.training import validation
from sdt_diffusion.training.model_arguments import ModelArguments
from sdt_diffusion.training.monitor import read_log
from sdt_diffusion.training.objectives import DiffusionLoss, ObjectiveArguments, build_objective
from sdt_diffusion.training.train_dit import flops_of, main
from sdt_diffusion.training.validation import DiffusionValidation, hold_out
from tests.conftest import randomize
from tests.training.helpers import build_run, trained

SIZES = {"sample_size": 8, "in_channels": 1, "num_classes": 10}
ARGUMENTS = {"model": "SDT-digits", "model_overrides": '{"num_layers": 1}'}


@pytest.fixture
def digits():
    return open_training_data(DataArguments(dataset="digits"), None, default_sample_size=8, seed=0)


class TestStartingFromTrainedWeights:
    @pytest.fixture
    def trained(self):
        return randomize(ModelArguments(**ARGUMENTS).build(**SIZES))

    @pytest.mark.parametrize("kind", ["pipeline", "transformer"])
    def test_a_new_run_starts_from_a_saved_pipeline_or_transformer(self, trained, tmp_path, kind):
        saved = trained
        if kind == "pipeline":
            saved = SDTPipeline(trained, build_objective(ObjectiveArguments()).sampling_scheduler(pixels=True))
        saved.save_pretrained(tmp_path)
        # What only training does may differ.
        model = ModelArguments(**ARGUMENTS, init_from=str(tmp_path), class_dropout_prob=0.3).build(**SIZES)
        assert model.config.class_dropout_prob == 0.3
        for a, b in zip(model.state_dict().values(), trained.state_dict().values(), strict=True):
            assert torch.equal(a, b)

    def test_another_architecture_is_refused_with_all_that_differs(self, trained, tmp_path):
        trained.save_pretrained(tmp_path)
        other = ModelArguments(**ARGUMENTS, init_from=str(tmp_path), qk_norm="rms_norm")
        with pytest.raises(ValueError, match=r"is another model: num_classes: 10 there, 7 now; qk_norm"):
            other.build(**{**SIZES, "num_classes": 7})

    def test_missing_weights_are_not_initialized_at_random(self, trained, tmp_path):
        trained.save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        del weights["proj_out_2.weight"]
        save_file(weights, path)
        (tmp_path / "checksums.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"has no weights for proj_out_2\.weight"):
            ModelArguments(**ARGUMENTS, init_from=str(tmp_path)).build(**SIZES)

    def test_a_folder_without_a_model_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no SDT transformer"):
            ModelArguments(**ARGUMENTS, init_from=str(tmp_path)).build(**SIZES)


class TestHeldOutImages:
    def test_they_are_random_the_same_for_all_seeds_and_not_trained_on(self, digits):
        train, held_out = hold_out(digits.images, 100)
        assert (len(train), len(held_out)) == (1697, 100)
        assert not set(train.indices) & set(held_out.indices)
        assert set(held_out.indices) == set(hold_out(digits.images, 100)[1].indices)
        assert len(set(held_out.labels)) == 10

    def test_none_and_all_of_them(self, digits):
        assert hold_out(digits.images, 0) == (digits.images, None)
        with pytest.raises(ValueError, match="held_out_images 1797 leaves none of the 1797 images"):
            hold_out(digits.images, 1797)

    def test_their_loss_is_fixed_and_that_of_a_perfect_model_is_zero(self, digits, tmp_path):
        class Perfect(torch.nn.Module):
            """Predicts noise - x, which it finds from the noised image by the image it knows."""

            def forward(self, sample, timestep, class_labels, force_drop_ids, return_dict):
                assert not force_drop_ids.any()
                sigma = timestep.reshape(-1, 1, 1, 1) / 1000
                noise = (sample - (1 - sigma) * self.clean) / sigma
                return (noise - self.clean,)

        run, perfect = build_run(tmp_path, train_batch_size=8), Perfect()
        loss = DiffusionLoss(build_objective(ObjectiveArguments()), class_dropout_prob=0.5)
        _, held_out = hold_out(digits.images, 20)

        def clean_of(batch, draws):
            perfect.clean = batch
            return batch

        validation = DiffusionValidation(None, loss, digits, held_out, num_images=1, sampling={})
        loss.clean_of = clean_of
        run.trained_model = perfect
        assert validation.held_out_loss(run, held_out) == pytest.approx(0, abs=1e-6)
        run.trained_model = lambda sample, *args, **kwargs: (torch.zeros_like(sample),)
        first, second = (validation.held_out_loss(run, held_out) for _ in range(2))
        assert first == second
        assert first > 0.5


def test_operations_are_counted_without_running_the_model():
    model = ModelArguments(**ARGUMENTS).build(**SIZES)
    inputs = (torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert flops_of(model) == 2 * count_cost(model, *inputs).multiply_adds > 1e6


def test_the_last_grid_is_sampled_once_and_is_also_samples_png(digits, tmp_path, monkeypatch):
    calls = []

    def generate(pipe, labels, **sampling):
        calls.append(labels)
        return [Image.new("L", (8, 8), 25 * label) for label in labels]

    monkeypatch.setattr(validation, "generate_on_all_processes", generate)
    run = build_run(tmp_path, max_train_steps=4, config={"validation_steps": 2})
    loss = DiffusionLoss(build_objective(ObjectiveArguments()))
    trained(run, validate=DiffusionValidation(None, loss, digits, None, num_images=20, sampling={"seed": 0}))
    assert calls == [[*range(10), *range(10)]] * 2
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["step-0000002.png", "step-0000004.png"]
    assert (tmp_path / "samples.png").read_bytes() == (tmp_path / "samples" / "step-0000004.png").read_bytes()
    assert (tmp_path / "loss_curve.png").is_file()


class TestTermsOfTheLoss:
    FLAGS = (
        *("--model_overrides", '{"num_layers": 2}', "--train_batch_size", "8", "--checkpointing_steps", "1"),
        *("--mixed_precision", "no", "--cpu_threads", "1", "--report_to", "none", "--held_out_images", "8"),
        *("--num_validation_images", "1", "--num_inference_steps", "1", "--label_accuracy_samples", "0"),
    )

    def test_flags_train_them_and_the_pipeline_has_the_shift_and_no_head(self, tmp_path):
        flags = ("--time_shift", "0", "--contrastive_weight", "0.05", "--dispersive_weight", "0.5")
        flags += ("--dispersive_images", "4", "--self_alignment_weight", "0.2", "--logging_steps", "1")
        flags += ("--output_dir", str(tmp_path), *self.FLAGS)
        main([*flags, "--max_train_steps", "1"])
        main([*flags, "--max_train_steps", "2", "--resume_from_checkpoint", "latest"])
        pipe = SDTPipeline.from_pretrained(tmp_path)
        assert pipe.scheduler.config.shift == 0.125  # sqrt(8 * 8 / 4096)
        saved = {path.parent.name for path in tmp_path.rglob("*.safetensors") if "checkpoint" not in str(path)}
        assert saved == {"transformer"}
        assert (tmp_path / "checkpoint-2" / "heads.safetensors").is_file()
        record = next(record for record in read_log(tmp_path) if record["step"] == 2 and "loss" in record)
        assert {"contrastive_loss", "dispersive_loss", "self_alignment_loss"} <= set(record)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--direction_loss_weight", "1"], "needs images of several channels, not in_channels 1"),
            (["--dispersive_weight", "0.5"], "dispersive_images needs a train_batch_size that is a multiple of 32"),
            (["--self_alignment_weight", "1", "--no_use_ema"], "self_alignment_weight needs use_ema"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_anything_is_written(self, tmp_path, flags, message):
        with pytest.raises(SystemExit, match=message):
            main(["--output_dir", str(tmp_path / "out"), *self.FLAGS, *flags])
        assert not (tmp_path / "out").exists()
