import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from torch import nn

from sdt_diffusion.hub import HubArguments, derive_record, describe_run
from sdt_diffusion.hub.run_record import RECORD_FILE, as_yaml, command_of, read_record, write_record
from sdt_diffusion.utils.arguments import given_arguments, merged, parse_arguments
from sdt_diffusion.utils.fingerprint import fingerprint
from sdt_diffusion.utils.ranges import CheckedArguments, a_seed, more_than
from tests.hub.flowers import CONFIG, FiveImages


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@dataclass
class Flags(CheckedArguments):
    """A few arguments of a script."""

    dataset: str = "digits"
    output_dir: str = "outputs"
    seed: int = field(default=0, metadata=a_seed())
    learning_rate: float = field(default=1e-4, metadata=more_than(0))
    ema_sigma_rel: list[float] = field(default_factory=list, metadata=more_than(0))
    use_ema: bool = True
    allow_tf32: bool = False
    model_overrides: str | None = None
    resume_from_checkpoint: str | None = None


TYPES = (Flags, HubArguments)


def command(*argv, num_processes=1):
    return command_of("train/train_dit.py", given_arguments(TYPES, argv), num_processes)


def test_the_command_is_what_was_typed():
    argv = ["--model_overrides", '{"num_layers": 6}', "--allow_tf32", "--ema_sigma_rel", "0.05", "0.1", "--seed", "1"]
    line = command(*argv)
    assert shlex.split(line) == ["accelerate", "launch", "train/train_dit.py", *argv]
    assert command(num_processes=8) == "accelerate launch --num_processes 8 train/train_dit.py"
    assert command("--learning-rate=1e-3").endswith("train_dit.py --learning_rate 0.001")
    assert command("--no_use_ema").endswith("--use_ema False")
    assert command("--config", "digits", "--seed=0").endswith("train_dit.py --config digits --seed 0")


@pytest.mark.parametrize(
    "argv",
    [
        ["--hub_token", "hf_secret"],
        ["--hub_token=hf_secret"],
        ["--hub-token", "hf_secret"],
        ["--hub-token=hf_secret"],
        ["--hub_token", "hf_secret", "--hub-token", "hf_secret2"],
    ],
)
def test_the_command_and_the_values_have_no_token(argv):
    assert command("--seed", "1", *argv, "--allow_tf32") == command("--seed", "1", "--allow_tf32")
    assert "hf_secret" not in str(merged(*parse_arguments(TYPES, argv)))


def test_a_token_in_a_config_file_is_in_no_value(tmp_path):
    (tmp_path / "run.yaml").write_text("hub_token: hf_secret\n")
    argv = ["--config", str(tmp_path / "run.yaml")]
    *_, hub_args = parse_arguments(TYPES, argv)
    assert hub_args.hub_token == "hf_secret"
    assert "hf_secret" not in command(*argv) + str(merged(hub_args))


@pytest.mark.parametrize("flag", ["--resume_from_checkpoint", "--resume-from-checkpoint"])
def test_a_resumed_run_is_that_of_the_command_without_resuming(flag):
    assert command(flag, "latest", "--seed", "1") == command("--seed", "1")


def test_paths_are_of_the_working_directory_or_the_home(tmp_path):
    home = Path.home()
    line = command("--dataset", f"{home}/my data", f"--output_dir={Path.cwd()}/out", f"--config={home}/run.yaml")
    assert line.endswith("""--dataset "$HOME"/'my data' --output_dir out --config "$HOME"/run.yaml""")
    assert str(tmp_path) not in line


def test_other_paths_are_reduced_to_their_last_name(tmp_path):
    line = command(
        "--dataset", f"{tmp_path}/my data/birds", f"--output_dir={tmp_path}/x*.tar", "--config", "/run.yaml"
    )
    assert line.endswith("--dataset .../birds --output_dir '.../x*.tar' --config .../run.yaml")
    assert command("--output_dir", str(Path.home())).endswith('--output_dir "$HOME"/')
    assert command("--output_dir", str(Path.cwd())).endswith("--output_dir .")


def test_a_script_that_python_starts_is_told_so():
    assert command_of("train/reconstruct_ema.py", {"sigma_rel": 0.1}) == (
        "python train/reconstruct_ema.py --sigma_rel 0.1"
    )


def test_the_record_says_what_the_run_was(tmp_path):
    network, vae = nn.Linear(3, 4), nn.Linear(2, 2)
    config = {**CONFIG, "dataset": f"{Path.home()}/data", "vae": f"{tmp_path}/vae"}
    config |= {"resume_from_checkpoint": "latest"}
    record = describe_run("a command", config, FiveImages(range(7)), [network, vae], 100, 4, 2)
    assert record["config"] == {**CONFIG, "dataset": "~/data", "vae": ".../vae"}
    assert record["kind"] == "training_run"
    assert str(tmp_path) not in json.dumps(record)
    assert record["data"] == {"name": "flowers", "on_hub": True, "num_images": 7, "num_classes": 5}
    assert record["parameters"] == 16
    assert record["weights"] == fingerprint(network, vae)
    assert (record["steps"], record["images_per_step"], record["num_processes"]) == (100, 4, 2)
    assert set(record["versions"]) >= {"sdt_diffusion", "torch", "diffusers"}


@pytest.mark.parametrize("name", ["digits", "some/folder/of/images", "flowers.d"])
def test_only_what_may_be_on_the_hub_is_named_as_such(name):
    Path("flowers.d").mkdir()
    images = FiveImages(range(7))
    images.name = name
    assert not describe_run("", {}, images, [nn.Linear(1, 1)], 1, 1, 1)["data"]["on_hub"]


def test_what_was_made_from_a_run_without_training_has_a_record_of_its_own(tmp_path):
    folder, network = tmp_path / "runs" / "power", nn.Linear(3, 4)
    folder.mkdir(parents=True)
    record = describe_run("a command", CONFIG, FiveImages(range(7)), [network], 100, 4, 2)
    write_record(folder, record)
    other = nn.Linear(3, 4)
    changes = {"command": "another", "steps": 50, "sigma_rel": 0.15, "snapshots": 9}
    derived = derive_record(folder, [other], changes)
    assert derived["weights"] == fingerprint(other) != record["weights"]
    assert (derived["command"], derived["steps"]) == ("a command\nanother", 50)
    assert derived["derived"] == {
        "source": ".../power",
        "source_weights": record["weights"],
        "sigma_rel": 0.15,
        "snapshots": 9,
    }
    same = ("kind", "config", "data", "parameters", "images_per_step", "num_processes", "versions")
    assert {key: derived[key] for key in same} == {key: record[key] for key in same}
    assert read_record(folder) == record
    with pytest.raises(ValueError, match="holds no finished run"):
        derive_record(tmp_path / "nowhere", [other], {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": 3}, "command is 3, and must be a str"),
        ({"weights": None}, "weights is None"),
        ({"data": []}, r"data is \[\]"),
        ({"data": {"name": "flowers"}}, "data.on_hub is None"),
        ({"steps": "many"}, "steps is 'many', and must be a int"),
        ({"versions": "0.1"}, "versions is '0.1'"),
    ],
)
def test_a_record_with_other_types_is_damaged(tmp_path, change, message):
    record = describe_run("a command", CONFIG, FiveImages(range(7)), [nn.Linear(3, 4)], 100, 4, 2)
    write_record(tmp_path, {**record, **change})
    with pytest.raises(ValueError, match=f"{RECORD_FILE} is damaged: {message}"):
        read_record(tmp_path)


def test_the_config_is_yaml_without_what_is_not_set():
    values = yaml.safe_load(as_yaml(CONFIG))
    assert values == {key: value for key, value in CONFIG.items() if value is not None}


def test_a_folder_without_a_whole_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"holds no finished run of a training script: it has no {RECORD_FILE}"):
        read_record(tmp_path)
    (tmp_path / RECORD_FILE).write_text('{"command": ')
    with pytest.raises(ValueError, match=f"{RECORD_FILE} is damaged"):
        read_record(tmp_path)
