from pathlib import Path

import pytest
import yaml

from sdt_diffusion.experiments.study import fill, flag, merge, read_study
from tests.experiments.studies import STUDY, build_study, write_study

STUDIES = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))


class TestReading:
    def test_cells_are_all_variants_of_the_first_seed_then_of_the_next(self, tmp_path):
        names = [cell.name for cell in build_study(tmp_path).cells()]
        assert names == ["none-seed0", "context-seed0", "none-seed1", "context-seed1"]

    def test_a_variants_arguments_go_over_those_of_the_study_and_json_is_merged(self, tmp_path):
        variants = {"wide": {"model_overrides": {"num_attention_heads": 2}}}
        study = build_study(tmp_path, variants=variants, baseline=None)
        (cell, _) = study.cells()
        assert cell.arguments["model_overrides"] == {"num_layers": 1, "num_attention_heads": 2}
        assert cell.arguments["train_batch_size"] == 4
        assert study.baseline == "wide"

    def test_variants_can_be_added_in_order_besides_alone(self, tmp_path):
        variants = {"dit": {"objective": "ddpm"}, "flow": {"objective": "flow"}, "rotary": {"rotary": True}}
        study = build_study(tmp_path, variants=variants, cumulative=["flow", "rotary"], baseline="dit")
        assert list(study.variants) == ["dit", "flow", "rotary", "+rotary"]
        assert study.variants["+rotary"] == {"objective": "flow", "rotary": True}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"title": None}, "title is missing"),
            ({"variant": {}}, "unknown key 'variant': did you mean variants"),
            ({"trainer": "train"}, "trainer must be train_dit or train_classifier, not 'train'"),
            ({"seeds": [0, 0]}, "seeds must be a list of different numbers"),
            ({"seeds": ["a"]}, "seeds must be a whole number, not 'a'"),
            ({"seeds": []}, "seeds must be a list"),
            ({"seeds": [-1]}, "seeds must be at least 0"),
            ({"variants": {}}, "variants must name at least one"),
            ({"variants": {"none": 3}}, "variants: none must be a mapping"),
            ({"variants": {"../none": {}}, "baseline": None}, r"'../none' is no name"),
            ({"baseline": "nothing"}, "baseline must be one of the variants, not 'nothing'"),
            ({"also_compare": ["none"]}, "also_compare must be a list of variants other than the baseline"),
            ({"also_compare": "context"}, "also_compare must be a list"),
            ({"cumulative": ["other"]}, "cumulative must be a list of different variants"),
            ({"evaluation": {"sample": 3}}, "unknown evaluation 'sample': did you mean samples"),
            ({"evaluation": {"samples": 1}}, "samples must be at least 2"),
            (
                {"arguments": {**STUDY["arguments"], "learning_rat": 1}},
                r"variant none: unknown argument\(s\) --learning_rat",
            ),
            (
                {"arguments": {**STUDY["arguments"], "max_train_steps": 0}},
                "variant none: max_train_steps must be at least 1",
            ),
            ({"arguments": {**STUDY["arguments"], "seed": 3}}, "variant none: seed is set by the runner"),
            ({"variants": {"none": {"objective": "flow", "snr_gamma": 5}}}, "variant none: snr_gamma does not apply"),
            ({"arguments": {"held_out_images": 0}}, "measures no velocity error"),
        ],
    )
    def test_what_makes_no_study_is_refused_with_the_key(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=rf"small\.yaml: .*{message}"):
            build_study(tmp_path, **changes)

    def test_samples_of_a_classifier_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="evaluation: reference is for samples of train_dit"):
            build_study(tmp_path, trainer="train_classifier", arguments={}, variants={"none": {}})

    def test_a_study_can_extend_another_one(self, tmp_path):
        write_study(tmp_path, name="base")
        path = tmp_path / "more.yaml"
        path.write_text("extends: base\ntitle: More\narguments: {train_batch_size: 8, max_train_samples: 100}\n")
        base, study = read_study(tmp_path / "base.yaml"), read_study(path)
        assert (study.name, study.title, study.variants) == ("more", "More", base.variants)
        assert study.arguments == {**base.arguments, "train_batch_size": 8, "max_train_samples": 100}
        (tmp_path / "third.yaml").write_text("extends: more\n")
        with pytest.raises(ValueError, match="extends: more extends a study itself"):
            read_study(tmp_path / "third.yaml")

    def test_a_file_that_is_none_is_named(self, tmp_path):
        path = tmp_path / "broken.yaml"
        path.write_text("variants: [")
        with pytest.raises(ValueError, match=r"broken\.yaml is not valid YAML"):
            read_study(path)


class TestPlaceholders:
    def test_folders_of_the_machine_are_in_the_command_line_and_not_in_the_config(self, tmp_path):
        arguments = {**STUDY["arguments"], "dataset": "{data}/train.parquet"}
        study = build_study(tmp_path, arguments=arguments, evaluation={"extractor": "{extractor}"})
        assert study.placeholders == ["data", "extractor"]
        cell = study.cells()[2]
        argv, evaluation = cell.filled({"data": "/disk", "extractor": "/other"})
        assert "--dataset=/disk/train.parquet" in argv
        assert argv[-1] == "--seed=1"
        assert evaluation.extractor == "/other"
        assert "disk" not in yaml.dump(cell.config)

    def test_one_without_a_folder_is_named(self):
        with pytest.raises(ValueError, match=r"'\{data\}/a' needs a folder for \{data\}"):
            fill({"dataset": ["{data}/a"]}, {})


def test_another_argument_makes_another_folder_to_work_in(tmp_path):
    one, other = build_study(tmp_path), build_study(tmp_path, evaluation={"samples": 11})
    assert one.cells()[0].folder_name == build_study(tmp_path).cells()[0].folder_name
    assert one.cells()[0].folder_name != other.cells()[0].folder_name


def test_arguments_become_words_of_a_command_line():
    assert flag("rotary", True) == ["--rotary=True"]
    assert flag("scale", [0.5, 1]) == ["--scale", "0.5", "1"]
    assert flag("model_overrides", {"num_layers": 1}) == ['--model_overrides={"num_layers": 1}']
    assert flag("snr_gamma", None) == []


def test_none_takes_an_argument_back():
    assert merge({"snr_gamma": 5}, {"snr_gamma": None}) == {"snr_gamma": None}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_repository_can_be_read(path):
    study = read_study(path)
    assert study.title
    assert len(study.cells()) == len(study.variants) * len(study.seeds)


def test_a_study_is_written_as_it_is_read(tmp_path):
    assert read_study(write_study(tmp_path)) == read_study(write_study(tmp_path))
