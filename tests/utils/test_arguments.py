import dataclasses
import importlib
import json
import pkgutil
import sys
from pathlib import Path

import pytest
import yaml

import sdt_diffusion
from sdt_diffusion.data import DataArguments
from sdt_diffusion.evaluation.fid import FidArguments
from sdt_diffusion.hub import HubArguments
from sdt_diffusion.training.config import RunArguments
from sdt_diffusion.training.ema import EMAArguments
from sdt_diffusion.training.model_arguments import ModelArguments
from sdt_diffusion.training.optimizer import OptimizationArguments
from sdt_diffusion.training.recipe import RecipeArguments
from sdt_diffusion.utils.arguments import (
    RECIPES_FOLDER,
    fields_with,
    json_object,
    merged,
    parse_arguments,
)

TYPES = (ModelArguments, DataArguments, OptimizationArguments, EMAArguments, RunArguments)


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
        (
            "learning_rat: 1\nseeds: 2",
            "run.yaml: unknown key(s) learning_rat (did you mean learning_rate?), seeds (did you mean seed?)",
        ),
        ("seed: many", "argument --seed: invalid int value: 'many'"),
        ("spatial_decay: spiral", "invalid choice: 'spiral' (choose from"),
        ("- seed", "must hold a mapping"),
        ("seed", "must hold a mapping"),
        ("seed: [", "is not valid YAML"),
        ("seed: !!python/name:os.system", "is not valid YAML"),
        ("seed: \xff\ud800", "is not a text in UTF-8"),
        ("[1]: 2", "is not valid YAML"),
        ("seed: {a: 1}", "run.yaml: seed must be a single value, not {'a': 1}"),
        ("seed: [1, 2]", "run.yaml: seed must be a single value, not [1, 2]"),
        ("seed: []", "run.yaml: seed must be a single value, not []"),
        ("output_dir: {a: 1}", "run.yaml: output_dir must be a single value, not {'a': 1}"),
        ("output_dir: {2020-01-01: 1}", "run.yaml: output_dir must be a single value, not {datetime"),
        ("model_overrides: [1]", "run.yaml: model_overrides must be a single value, not [1]"),
        ("model_overrides: {a: 2020-01-01}", "run.yaml: model_overrides cannot be written as JSON"),
        ("ema_sigma_rel: [0.1, [0.2]]", "run.yaml: ema_sigma_rel must be a list of single values, not [0.1, [0.2]]"),
        ("ema_sigma_rel: [0.1, null]", "run.yaml: ema_sigma_rel must be a list of single values, not [0.1, None]"),
        ("ema_sigma_rel: {a: 1}", "run.yaml: ema_sigma_rel must be a list of single values, not {'a': 1}"),
        ("ema_sigma_rel: []", "--ema_sigma_rel/--ema-sigma-rel: expected at least one argument"),
        ("ema_sigma_rel: [a]", "--ema_sigma_rel/--ema-sigma-rel: invalid float value: 'a'"),
        ("yes: 1", "run.yaml: unknown key(s) yes"),
        ("1: 1", "run.yaml: unknown key(s) 1"),
        ("null: 1", "run.yaml: unknown key(s) None"),
    ],
)
def test_bad_yaml_is_refused_in_one_line_with_the_reason(config, capsys, text, message):
    path = config("")
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(SystemExit) as caught:
        parse("--config", str(path))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "unknown argument(s) --learning_rat (did you mean --learning_rate?)"),
        (["--learn", "1"], "unknown argument(s) --learn (did you mean --learning_rate?)"),
        (["--learning-rat=1"], "unknown argument(s) --learning-rat (did you mean --learning-rate?)"),
        (["--xyzzy", "1"], "unknown argument(s) --xyzzy; --help lists all"),
        (["1"], "unexpected argument(s) 1"),
        (["--seed", "many"], "argument --seed: invalid int value: 'many'"),
        (["--config"], "argument --config: expected one argument"),
        (
            ["--config", "nowhere.yaml"],
            "no file nowhere.yaml, and the recipes are cifar10_classifier, digits",
        ),
        (["--config", "digit"], "there is no file digit, and the recipes are cifar10_classifier, digits"),
        (["--seed", "-1"], "error: seed must be at least 0, not -1"),
        (["--logging_steps", "0"], "error: logging_steps must be at least 1, not 0"),
        (["--learning_rate", "nan"], "error: learning_rate must be a finite number, not nan"),
    ],
)
def test_bad_flags_are_refused_in_one_line_with_the_reason(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_mistyped_required_flag_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_arguments((FidArguments,), ["--reference", "digits", "--outptu", "a.json"])
    assert "unknown argument(s) --outptu (did you mean --output?)" in capsys.readouterr().err


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


def test_underscores_and_hyphens_are_the_same():
    assert parse("--max-train-steps", "3") == parse("--max_train_steps=3")
    assert parse("--no-use-ema")["use_ema"] is parse("--no_use_ema")["use_ema"] is False


def test_empty_and_missing_values_of_a_yaml_file_leave_the_defaults(config):
    path = config("metrics: []\nsamples: null\nreference: digits\noutput: a.json\n")
    (args,) = parse_arguments((FidArguments,), ["--config", str(path)])
    assert (args.metrics, args.samples) == ([], None)
    assert parse("--config", str(config("# nothing\n"))) == parse()


def test_yaml_merge_keys_are_merged(config):
    assert parse("--config", str(config("<<: {seed: 3}\ntrain_batch_size: 2\n")))["seed"] == 3


@pytest.mark.parametrize("name", ["digits", "digits.yaml", str(RECIPES_FOLDER / "digits.yaml")])
def test_a_recipe_of_the_package_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder of this name, such as a run's, is no recipe
    expected = yaml.safe_load((RECIPES_FOLDER / "digits.yaml").read_text())
    (values,) = parse_arguments((RunArguments,), ["--config", str(_only_keys_of(RunArguments, expected, tmp_path))])
    monkeypatch.setattr("sdt_diffusion.utils.arguments.RECIPES_FOLDER", tmp_path / "recipes")
    if Path(name).is_absolute():
        name = str(tmp_path / "recipes" / "digits.yaml")
    (found,) = parse_arguments((RunArguments,), ["--config", name])
    assert found == values != RunArguments()


def _only_keys_of(dataclass_type, values, folder):
    names = {field.name for field in dataclasses.fields(dataclass_type)}
    path = folder / "recipes" / "digits.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if key in names}))
    return path


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("seed: 77\n")
    assert parse("--config", "digits")["seed"] == 77


def help_text(capsys, *types, **kwargs):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(types, ["--help"], **kwargs)
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_defaults_and_leaves_the_description_as_it_is(capsys):
    @dataclasses.dataclass
    class Arguments:
        needed: int = dataclasses.field(metadata={"help": "Needed."})
        share: str = dataclasses.field(default="50%", metadata={"help": "Share."})
        widths: list[float] = dataclasses.field(default_factory=lambda: [0.05, 0.1], metadata={"help": "Widths."})
        names: list[str] = dataclasses.field(default_factory=list, metadata={"help": "Names."})
        limit: int | None = dataclasses.field(default=None, metadata={"help": "Limit.", "resumable": True})
        average: bool = dataclasses.field(default=True, metadata={"help": "Average."})

    Arguments.__annotations__ = {f.name: f.type for f in dataclasses.fields(Arguments)}
    with pytest.raises(SystemExit):
        parse_arguments((Arguments,), ["--help"], description="First.\n\n    indented")
    out = capsys.readouterr().out
    assert "\n    indented" in out
    words = " ".join(out.split())
    for said in (
        "Needed. --share",
        "Share. (default: 50%)",
        "Widths. (default: 0.05 0.1)",
        "Names. --limit",
        "Limit. --average",
        "Average. (default: True)",
        "Turn off --average. --config",
    ):
        assert said in words


def all_argument_types():
    for module in pkgutil.walk_packages(sdt_diffusion.__path__, "sdt_diffusion."):
        if module.name == "sdt_diffusion.demo.page":  # which has none, and needs an extra
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__name__.endswith("Arguments"):
                yield value


def test_every_flag_of_every_script_is_explained_and_shows_its_default(capsys):
    types = set(all_argument_types())
    assert {DataArguments, FidArguments, RecipeArguments, RunArguments} <= types
    for each in types:
        words = help_text(capsys, each)
        for field in dataclasses.fields(each):
            assert field.metadata.get("help"), f"{each.__name__}.{field.name}"
            if isinstance(field.default, (int, float)):
                assert f"(default: {field.default})" in words
        assert "default: None" not in words


def test_fields_are_found_by_their_mark():
    @dataclasses.dataclass
    class Marked:
        a: int = dataclasses.field(default=1, metadata={"help": "A.", "resumable": True})
        b: int = dataclasses.field(default=1, metadata={"help": "B."})

    assert fields_with("resumable", Marked, RecipeArguments) >= {"a"}
    assert fields_with("resumable", Marked()) == {"a"}


def test_marks_of_fields_are_not_handed_to_argparse():
    marked = dataclasses.make_dataclass(
        "Marked", [("a", int, dataclasses.field(default=1, metadata={"help": "A.", "resumable": True}))]
    )
    (args,) = parse_arguments((marked,), ["--a", "3"])
    assert args.a == 3


def test_the_library_speaks_of_parameters():
    with pytest.raises(ValueError, match=r"^overrides must be a JSON object, not \[\]\.$"):
        json_object("[]", "overrides")
    assert json_object(None, "overrides") == {}
    assert json_object(json.dumps({"a": 1}), "overrides") == {"a": 1}


@pytest.mark.parametrize(
    "argv",
    [
        ["--hub_token", "hf_secret", "hf_secret"],
        ["--hub-token=hf_secret", "hf_secret"],
        ["--hub_token", "--", "hf_secret"],
    ],
)
def test_no_message_shows_a_token(argv, capsys):
    with pytest.raises(SystemExit):
        parse_arguments((HubArguments,), argv)
    error = capsys.readouterr().err
    assert "hf_secret" not in error
    assert error.count("\n") == 1


def test_no_message_about_a_config_file_shows_a_token(config, capsys):
    with pytest.raises(SystemExit):
        parse_arguments((HubArguments,), ["--config", str(config("hub_token: [hf_secret]"))])
    assert "hub_token must be a single value, not (hidden)" in capsys.readouterr().err


def test_messages_are_short(capsys):
    with pytest.raises(SystemExit):
        parse("--dataset=" + "x" * 5000, "y" * 5000)
    assert len(capsys.readouterr().err) < 1000


def test_a_value_that_argparse_takes_for_a_list_is_refused(config, capsys):
    for argv in (["--dataset=--"], ["--config", str(config('dataset: "--"'))]):
        with pytest.raises(SystemExit):
            parse(*argv)
        assert "--dataset cannot be '--'" in capsys.readouterr().err


def test_a_file_beside_the_script_adds_no_flags(tmp_path, monkeypatch):
    (tmp_path / "script.args").write_text("--seed 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    assert parse()["seed"] == 0
