"""Share by train/share.py, and at the end of the training scripts."""

import sys

import pytest
from diffusers import DiffusionPipeline

from tests.hub.hub_stand_in import TOKEN, HubStandIn
from tests.scripts.process import load_main, run

SMALL = [
    *("--cpu_threads", "1", "--model_overrides", '{"num_layers": 1}', "--train_batch_size", "8"),
    *("--max_train_steps", "2", "--lr_warmup_steps", "0", "--validation_steps", "0", "--report_to", "none"),
    *("--num_inference_steps", "2", "--num_validation_images", "10", "--label_accuracy_samples", "10"),
]


def test_a_training_run_is_pushed_without_checkpoints_and_token(tmp_path, monkeypatch):
    folder = tmp_path / "digits"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with HubStandIn() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        sharing = ("--push_to_hub", "--hub_model_id", "me/digits", "--hub_token", TOKEN)
        result = run(sys.executable, "train/train_dit.py", *SMALL, "--output_dir", folder, *sharing)
    assert f"Pushed to {hub.url}/me/digits/commit" in result.stdout
    arrived = hub.repositories["me/digits"]
    assert not [name for name in arrived if "checkpoint" in name]
    assert (folder / "checkpoint-2").is_dir()
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert b"--push_to_hub --hub_model_id me/digits\n" in arrived["README.md"]
    assert b"| label accuracy | " in arrived["README.md"]

    hub.save("me/digits", tmp_path / "downloaded")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "downloaded")
    assert pipe(["7"], num_inference_steps=1).images[0].size == (8, 8)

    card = (folder / "README.md").read_text()
    load_main("train/share.py")(["--folder", str(folder), "--license", "mit"])
    assert "license: mit" in (folder / "README.md").read_text() != card


def test_without_a_repository_that_can_be_written_no_step_is_made(tmp_path, monkeypatch):
    folder = tmp_path / "digits"
    sharing = ["--push_to_hub", "--hub_model_id", "others/digits", "--hub_token", TOKEN]
    with HubStandIn() as hub:
        hub.replace_the_hub(monkeypatch)
        with pytest.raises(SystemExit, match="the repository others/digits cannot be made or opened"):
            load_main("train/train_dit.py")([*SMALL, "--output_dir", str(folder), *sharing])
    assert not (folder / "training_config.yaml").exists()


def test_a_malformed_name_is_refused_before_anything_is_written(tmp_path, capsys):
    main = load_main("train/train_dit.py")
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path / "out"), "--push_to_hub", "--hub_model_id", "a/b/c", "--hub_token", TOKEN])
    assert "error: hub_model_id: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no finished run of a training script"):
        load_main("train/share.py")(["--folder", str(tmp_path)])
