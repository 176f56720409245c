import json
import shlex
from pathlib import Path

import pytest
import yaml
from torch import nn

from sdt_diffusion.hub import derive_record, describe_run
from sdt_diffusion.hub.run_record import RECORD_FILE, as_yaml, command_of, read_record, write_record
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


@pytest.mark.parametrize(
    "argv",
    [
        ["--hub_token", "hf_secret"],
        ["--hub_token=hf_secret"],
        ["--hub-token", "hf_secret"],
        ["--hub-token=hf_secret"],
    ],
)
def test_the_command_has_no_token(argv):
    assert command("--seed", "1", *argv, "--allow_tf32") == command("--seed", "1", "--allow_tf32")


@pytest.mark.parametrize("flag", ["--resume_from_checkpoint", "--resume-from-checkpoint"])
def test_a_resumed_run_is_that_of_the_command_without_resuming(flag):
    assert command(flag, "latest", "--seed", "1") == command("--seed", "1")
    assert command("--seed", "1", flag) == command("--seed", "1")


def test_paths_are_of_the_working_directory_or_the_home(tmp_path):
    home = Path.home()
    line = command("--dataset", f"{home}/my data", f"--output_dir={Path.cwd()}/out", f"--config={home}/run.yaml")
    assert line.endswith("""--dataset "$HOME"/'my data' --output_dir=out --config="$HOME"/run.yaml""")
    assert str(tmp_path) not in line


def test_other_paths_are_reduced_to_their_last_name(tmp_path):
    line = command(
        "--dataset", f"{tmp_path}/my data/birds", f"--output_dir={tmp_path}/x*.tar", "--config", "/run.yaml"
    )
    assert line.endswith("--dataset .../birds '--output_dir=.../x*.tar' --config .../run.yaml")
    assert command("--output_dir", str(Path.home())).endswith('--output_dir "$HOME"/')
    assert command("--output_dir", str(Path.cwd())).endswith("--output_dir .")


def test_a_script_that_python_starts_is_told_so():
    assert command_of("train/reconstruct_ema.py", ["--sigma_rel", "0.1"]) == (
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


def test_the_config_is_yaml_without_what_is_not_set():
    values = yaml.safe_load(as_yaml(CONFIG))
    assert values == {key: value for key, value in CONFIG.items() if value is not None}


def test_a_folder_without_a_whole_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"holds no finished run of a training script: it has no {RECORD_FILE}"):
        read_record(tmp_path)
    (tmp_path / RECORD_FILE).write_text('{"command": ')
    with pytest.raises(ValueError, match=f"{RECORD_FILE} is damaged"):
        read_record(tmp_path)
