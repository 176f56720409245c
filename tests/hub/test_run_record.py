import shlex
from pathlib import Path

import pytest
import yaml
from torch import nn

from sdt_diffusion.hub import describe_run
from sdt_diffusion.hub.run_record import RECORD_FILE, as_yaml, command_of, read_record
from sdt_diffusion.utils.fingerprint import fingerprint
from tests.hub.flowers import CONFIG, FiveImages


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def command(*argv, num_processes=1):
    return command_of("train/train_dit.py", argv, num_processes)


def test_the_command_is_what_was_typed():
    argv = ["--model_overrides", '{"num_layers": 6}', "--push_to_hub", "--learning_rate=1e-3"]
    line = command(*argv)
    assert shlex.split(line) == ["accelerate", "launch", "train/train_dit.py", *argv]
    assert command(num_processes=8) == "accelerate launch --num_processes 8 train/train_dit.py"


@pytest.mark.parametrize("argv", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_the_command_has_no_token(argv):
    assert command("--seed", "1", *argv, "--allow_tf32") == command("--seed", "1", "--allow_tf32")


def test_a_resumed_run_is_that_of_the_command_without_resuming():
    assert command("--resume_from_checkpoint", "latest", "--seed", "1") == command("--seed", "1")


def test_paths_are_of_the_working_directory_or_the_home(tmp_path):
    home = Path.home()
    line = command("--dataset", f"{home}/my data", f"--output_dir={Path.cwd()}/out", f"--config={home}/run.yaml")
    assert line.endswith("""--dataset "$HOME"/'my data' --output_dir=out --config="$HOME"/run.yaml""")
    assert str(tmp_path) not in line


def test_the_record_says_what_the_run_was(tmp_path):
    network, vae = nn.Linear(3, 4), nn.Linear(2, 2)
    config = {**CONFIG, "dataset": f"{Path.home()}/data", "resume_from_checkpoint": "latest"}
    record = describe_run("a command", config, FiveImages(range(7)), [network, vae], 100, 4, 2)
    assert record["config"] == {**CONFIG, "dataset": "~/data"}
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


def test_the_config_is_yaml_without_what_is_not_set():
    values = yaml.safe_load(as_yaml(CONFIG))
    assert values == {key: value for key, value in CONFIG.items() if value is not None}


def test_a_folder_without_a_whole_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"holds no finished run of a training script: it has no {RECORD_FILE}"):
        read_record(tmp_path)
    (tmp_path / RECORD_FILE).write_text('{"command": ')
    with pytest.raises(ValueError, match=f"{RECORD_FILE} is damaged"):
        read_record(tmp_path)
