from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from sdt_diffusion import SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.training.init_from import (
    CLASS_TABLE,
    describe_classes,
    describe_objective,
    keep_shift,
    kept_classes,
    new_class_table,
    stored_shift,
)
from sdt_diffusion.training.model_arguments import ModelArguments
from sdt_diffusion.training.train_dit import main
from tests.conftest import TINY, randomize

SIZES = {"sample_size": 8, "in_channels": 3, "num_classes": 5}
NAMES = {0: "ant", 1: "bee, honey bee", 2: "cat", 3: "crane", 4: "crane"}


@pytest.fixture
def save(tmp_path):
    """Save a pipeline around a tiny model, and return the model and the folder."""

    def run(**config):
        model = randomize(SDTTransformer2DModel(**{**TINY, **config}))
        SDTPipeline(model, FlowMatchEulerDiscreteScheduler(), id2label=NAMES).save_pretrained(tmp_path / "stored")
        return model, str(tmp_path / "stored")

    return run


def build(folder, class_names=(), sizes=SIZES, **arguments):
    return ModelArguments(model="stored", init_from=folder, **arguments).build(class_names, **sizes)


def output(model, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        return model.eval()(images, torch.tensor([10.0, 900.0]), torch.tensor([1, 4])).sample


class TestStoredArchitecture:
    def test_nothing_needs_to_be_said_twice(self, save):
        unusual = {
            "norm_type": "rms",
            "qk_norm": "rms_norm",
            "rotary": True,
            "timestep_scale": 1e-3,
            "mlp_ratio": 8 / 3,
        }
        model, folder = save(**unusual, spatial_decay="raster", decay_start="none")
        started = build(folder, spatial_decay="raster", class_dropout_prob=0.0)
        assert {key: started.config[key] for key in unusual} == unusual
        assert started.config.class_dropout_prob == 0
        assert torch.equal(output(started), output(model))

    def test_arguments_that_contradict_it_are_refused(self, save):
        _, folder = save()
        with pytest.raises(ValueError, match="is another model: qk_norm: None there, 'rms_norm' now"):
            build(folder, qk_norm="rms_norm")
        with pytest.raises(ValueError, match="spatial_decay: 'context' there, 'none' now"):
            build(folder, spatial_decay="none")
        with pytest.raises(ValueError, match="decay_start: 'rmt' there, 'none' now"):
            build(folder, model_overrides='{"decay_start": "none"}')

    def test_a_rotary_embedding_can_be_added_but_not_taken_away(self, save):
        model, folder = save()
        started = build(folder, rotary=True)
        assert started.config.rotary
        assert torch.equal(started.proj_out_2.weight, model.proj_out_2.weight)
        _, folder = save(rotary=True)
        with pytest.raises(ValueError, match="rotary: True there, False now"):
            build(folder, rotary=False)

    def test_it_needs_a_folder(self):
        with pytest.raises(FileNotFoundError, match=r"init_from .*\.py is a file, .* by sdt-diffusion convert"):
            build(__file__)
        with pytest.raises(ValueError, match="model stored needs init_from"):
            ModelArguments(model="stored")
        with pytest.raises(ValueError, match="new_classes needs init_from"):
            ModelArguments(new_classes=True)


@pytest.mark.parametrize("spatial_decay", ["context", "content", "raster"])
def test_a_decay_that_is_added_starts_as_none(save, spatial_decay):
    model, folder = save(spatial_decay="none")
    started = build(folder, spatial_decay=spatial_decay)
    assert started.config.decay_start == "none"
    torch.testing.assert_close(output(started), output(model), rtol=1e-5, atol=1e-5)
    decayed = build(folder, spatial_decay=spatial_decay, model_overrides='{"decay_start": "rmt"}')
    assert (output(decayed) - output(model)).norm() > 1e-3 * output(model).norm()
    plain = build(folder, spatial_decay="none")
    assert plain.config.decay_start == "rmt"
    assert torch.equal(output(plain), output(model))


def test_another_resolution_has_the_weights_and_positions_of_its_own_grid(save):
    model, folder = save()
    started = build(folder, sizes={**SIZES, "sample_size": 12})
    for name, value in model.state_dict().items():
        assert torch.equal(value, started.state_dict()[name])
    # The stored grid is the corner of the new one: unit distances stay unit distances.
    corner = started.pos_embed.pos_embed.view(6, 6, -1)[:4, :4].flatten(0, 1)[None]
    torch.testing.assert_close(corner, model.pos_embed.pos_embed)
    assert output(started, 12).shape == (2, 3, 12, 12)


@pytest.mark.parametrize(("there", "now"), [(6, None), (None, 6)])
def test_outputs_for_a_variance_come_and_go(save, there, now):
    model, folder = save(out_channels=there)
    started = build(folder, model_overrides=f'{{"out_channels": {now or "null"}}}')
    assert torch.equal(output(started)[:, :3], output(model)[:, :3])
    assert output(started).shape[1] == (now or 3)


def test_another_objective_than_the_stored_one_is_said(save):
    folder = save()[1]
    flow, epsilon = {"prediction_type": "flow_prediction"}, {"prediction_type": "epsilon"}
    assert describe_objective(folder, flow) == ""
    line = f"{folder} has learned flow_prediction, and is trained on epsilon from here"
    assert describe_objective(folder, epsilon).startswith(line)
    assert describe_objective(f"{folder}/transformer", epsilon) == ""


class TestShift:
    """LightningDiT draws unshifted times in training and shifts those of sampling, which is its scheduler's."""

    @pytest.fixture
    def folder(self, tmp_path):
        model = randomize(SDTTransformer2DModel(**{**TINY, "in_channels": 1, "num_classes": 10, "num_layers": 1}))
        SDTPipeline(model, FlowMatchEulerDiscreteScheduler(shift=2.5)).save_pretrained(tmp_path / "stored")
        return str(tmp_path / "stored")

    @pytest.mark.parametrize(
        ("flags", "shift"),
        [([], 2.5), (["--time_shift", "2"], 2), (["--scheduler_options", '{"shift": 1}'], 1)],
        ids=["kept", "time_shift", "scheduler_options"],
    )
    def test_samples_keep_it_unless_another_is_given(self, folder, tmp_path, capsys, flags, shift):
        run = ["--init_from", folder, "--model", "stored", "--max_train_steps", "1", "--lr_warmup_steps", "0"]
        run += ["--validation_steps", "0", "--num_validation_images", "0", "--label_accuracy_samples", "0"]
        run += ["--train_batch_size", "2", "--cpu_threads", "1", "--report_to", "none"]
        main([*run, *flags, "--output_dir", str(tmp_path / "run")])
        assert SDTPipeline.from_pretrained(tmp_path / "run").scheduler.config.shift == shift
        said = f"Samples keep the shift 2.5 of {folder}" in capsys.readouterr().out
        assert said == (flags == [])

    def test_it_is_read_from_any_scheduler_of_flows_and_no_other(self, folder, tmp_path):
        pipe = SDTPipeline.from_pretrained(folder)
        pipe.swap_scheduler("DPMSolverMultistepScheduler")
        pipe.save_pretrained(tmp_path / "solver")
        assert stored_shift(str(tmp_path / "solver")) == 2.5
        SDTPipeline(pipe.transformer, DDIMScheduler()).save_pretrained(tmp_path / "ddpm")
        for other in (tmp_path / "ddpm", f"{folder}/transformer"):
            assert stored_shift(str(other)) is None
        assert keep_shift(DDIMScheduler(), folder)[1] == ""

    def test_one_of_no_sense_is_refused(self, folder):
        path = Path(folder, "scheduler", "scheduler_config.json")
        path.write_text(path.read_text().replace("2.5", "-1"))
        with pytest.raises(ValueError, match=r"The shift of .*scheduler_config\.json must be more than 0"):
            stored_shift(folder)


class TestNewClasses:
    def test_rows_follow_names_the_null_class_stays_and_others_are_new(self, save):
        model, folder = save()
        torch.manual_seed(1)
        names = ["cat", "zebra", "ant", "honey bee"]
        started = build(folder, names, {**SIZES, "num_classes": 4}, new_classes=True)
        stored, table = (each.state_dict()[CLASS_TABLE] for each in (model, started))
        assert torch.equal(table[[0, 2, 3, 4]], stored[[2, 0, 1, 5]])
        assert table[1].norm() < 0.2 < stored.norm(dim=1).min()
        assert (
            describe_classes(folder, names, True) == f"3 of 4 classes keep their rows of {folder}, 1 are new: zebra."
        )

    def test_where_no_name_is_known_all_classes_are_new(self, save):
        model, folder = save()
        torch.manual_seed(1)
        started = build(folder, ["gnu", "yak"], {**SIZES, "num_classes": 2}, new_classes=True)
        stored, weights = model.state_dict(), started.state_dict()
        assert weights[CLASS_TABLE].shape[0] == 3
        assert torch.equal(weights[CLASS_TABLE][-1], stored[CLASS_TABLE][-1])
        assert weights[CLASS_TABLE][:2].norm(dim=1).max() < 0.2 < stored[CLASS_TABLE].norm(dim=1).min()
        assert all(torch.equal(weights[name], stored[name]) for name in stored if name != CLASS_TABLE)
        line = f"0 of 2 classes keep their rows of {folder}, 2 are new: gnu, yak."
        assert describe_classes(folder, ["gnu", "yak"], True) == line

    def test_a_name_of_two_classes_is_none(self, save):
        _, folder = save()
        assert kept_classes(folder, ["crane", "bee, honey bee", "bee, cat", "wasp, bee"]) == {1: 1, 3: 1}

    def test_a_transformer_alone_knows_no_names(self, save):
        _, folder = save()
        assert kept_classes(f"{folder}/transformer", ["cat"]) == {}
        assert build(f"{folder}/transformer", ["cat"], {**SIZES, "num_classes": 1}, new_classes=True)

    def test_without_the_flag_other_classes_are_refused_with_what_to_do(self, save):
        _, folder = save()
        with pytest.raises(ValueError, match=r"num_classes: 5 there, 7 now.* new_classes other classes"):
            build(folder, sizes={**SIZES, "num_classes": 7})

    def test_without_the_flag_other_names_of_as_many_classes_are_said(self, save):
        _, folder = save()
        assert describe_classes(folder, list(NAMES.values()), False) == ""
        assert describe_classes(f"{folder}/transformer", ["gnu", "yak"], False) == ""
        names = [*list(NAMES.values())[:-1], "gnu"]
        line = f"{folder} has other names for 1 of {len(names)} classes: gnu. They start from the classes of the same "
        assert describe_classes(folder, names, False).startswith(line)

    def test_damaged_names_are_refused(self, save, tmp_path):
        _, folder = save()
        index = tmp_path / "stored" / "model_index.json"
        for damaged in ('{"id2label": [1]}', '{"id2label": {"a": "b"}}', '{"id2label": {"0": 1}}'):
            index.write_text(damaged)
            with pytest.raises(ValueError, match="id2label does not map labels to class names"):
                kept_classes(folder, ["cat"])

    def test_the_table_by_hand(self):
        stored, initial = torch.arange(3.0)[:, None], torch.full((4, 1), -1.0)
        assert new_class_table(stored, initial, {2: 0, 0: 1}).flatten().tolist() == [1, -1, 0, 2]
