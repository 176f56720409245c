import pytest
import yaml

from sdt_diffusion.data import DataArguments
from sdt_diffusion.evaluation.fid import FidArguments
from sdt_diffusion.training.config import OptimizationArguments, RunArguments
from sdt_diffusion.training.recipe import RecipeArguments
from sdt_diffusion.training.train_dit import ModelArguments
from sdt_diffusion.utils.arguments import merged, parse_arguments

TYPES = (ModelArguments, DataArguments, OptimizationArguments, RunArguments)


def parse(*argv, **kwargs):
    return merged(*parse_arguments(TYPES, argv, **kwargs))


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_command_line_wins_over_yaml_which_wins_over_defaults(config):
    path = config("learning_rate: 1e-3\nseed: 3\nuse_ema: false\nmodel_overrides: {num_layers: 2}\nresolution: null\n")
    values = parse("--config", str(path), "--seed", "7")
    assert (values["seed"], values["learning_rate"], values["use_ema"]) == (7, 1e-3, False)
    assert values["train_batch_size"] == 256
    assert values["resolution"] is None
    assert ModelArguments(model_overrides=values["model_overrides"]).config()["num_layers"] == 2


def test_a_data_set_brings_its_recipe_unless_a_config_is_given(config, tmp_path):
    recipes = {"digits": config("seed: 3\n")}
    assert parse(recipes=recipes)["seed"] == 3
    assert parse("--dataset=digits", recipes=recipes)["seed"] == 3
    assert parse("--dataset", "images", recipes=recipes)["seed"] == 0
    other = tmp_path / "other.yaml"
    other.write_text("train_batch_size: 2\n")
    assert parse("--config", str(other), recipes=recipes)["seed"] == 0


def test_yaml_values_mean_what_they_say(config):
    path = config("mixed_precision: no\nadam_epsilon: 1e-7\noutput_dir: -x\nrandom_flip: yes\n")
    values = parse("--config", str(path))
    assert values["mixed_precision"] == "no"
    assert values["adam_epsilon"] == 1e-7
    assert values["output_dir"] == "-x"
    assert values["random_flip"] is True


def test_lists_are_given_as_on_the_command_line(config):
    path = config("metrics: [fid, kid]\nreference: digits\noutput: a.json")
    args, _ = parse_arguments((FidArguments, DataArguments), ["--config", str(path)])
    assert args.metrics == ["fid", "kid"]


def test_the_written_config_is_one_that_can_be_read(config):
    values = parse("--seed", "5", "--model_overrides", '{"num_layers": 2}')
    assert parse("--config", str(config(yaml.safe_dump(values)))) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\nseeds: 2", "run.yaml: unknown key(s) learning_rat, seeds; known: adam_beta1"),
        ("seed: many", "argument --seed: invalid int value: 'many'"),
        ("spatial_decay: spiral", "invalid choice: 'spiral' (choose from"),
        ("- seed", "must hold a mapping"),
        ("seed: [", "is not valid YAML"),
    ],
)
def test_bad_yaml_is_refused_with_the_reason(config, capsys, text, message):
    with pytest.raises(SystemExit):
        parse("--config", str(config(text)))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "unknown argument(s) --learning_rat 1"),
        (["--learn", "1"], "unknown argument(s) --learn 1"),
        (["--config", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--logging_steps", "0"], "--logging_steps must be at least 1, not 0"),
        (["--learning_rate", "nan"], "--learning_rate must be at least 0, not nan"),
    ],
)
def test_bad_flags_are_refused_with_the_reason(capsys, argv, message):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err


def test_model_arguments_override_the_preset():
    model = ModelArguments(
        model="SDT-digits", spatial_decay="fixed", qk_norm="rms_norm", model_overrides='{"num_layers": 1}'
    ).build(num_classes=3)
    config = model.config
    assert (config.spatial_decay, config.qk_norm, config.num_layers, config.num_classes) == ("fixed", "rms_norm", 1, 3)
    assert config.sample_size == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"depth": 1}', r"Unknown config key\(s\) depth"),
        ('{"num_classes": 3}', "num_classes follow from the data set"),
    ],
)
def test_bad_model_overrides_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(model_overrides=overrides).config()


def test_lists_of_a_yaml_file_are_lists(config):
    (recipe,) = parse_arguments((RecipeArguments,), ["--config", str(config("scale: [0.5, 1]\naa: rand-m9\n"))])
    assert (recipe.scale, recipe.aa) == ([0.5, 1.0], "rand-m9")
    (recipe,) = parse_arguments(
        (RecipeArguments,), ["--config", str(config("scale: [0.5, 1]")), "--scale", "0.1", "1"]
    )
    assert recipe.scale == [0.1, 1.0]
