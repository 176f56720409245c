import dataclasses
import json

import pytest
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from sdt_diffusion import SDTPipeline
from sdt_diffusion.hub import HubArguments, create_hub_repo, share_folder
from sdt_diffusion.hub.push import files_to_share, main
from sdt_diffusion.utils.fingerprint import fingerprint
from tests.hub.hub_stand_in import TOKEN, HubStandIn


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub, which this process takes for the real one."""
    with HubStandIn() as stand_in:
        stand_in.replace_the_hub(monkeypatch)
        yield stand_in


def arguments(**given):
    return HubArguments(**{"push_to_hub": True, "hub_model_id": "me/flowers", "hub_token": TOKEN, **given})


def test_only_the_model_and_its_card_arrive(hub, finished_run, tmp_path):
    share_folder(arguments(), finished_run.folder)
    arrived = hub.repositories["me/flowers"]
    assert set(arrived) == {
        *("README.md", "training_run.json", "log.jsonl", "samples.png", "model_index.json"),
        *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"),
        *("transformer/checksums.json", "scheduler/scheduler_config.json"),
    }
    for name, content in arrived.items():
        assert content == (finished_run.folder / name).read_bytes()
        assert TOKEN.encode() not in content
    assert b'from_pretrained("me/flowers")' in arrived["README.md"]

    hub.save("me/flowers", tmp_path / "downloaded")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "downloaded")
    assert pipe([1], num_inference_steps=1).images[0].size == (8, 8)


def test_a_classifiers_weights_arrive(hub, finished_run):
    folder = finished_run.folder
    (folder / "model_index.json").unlink()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    share_folder(arguments(), folder)
    assert hub.repositories["me/flowers"]["model.safetensors"] == b"weights"
    assert {"config.json", "preprocessor_config.json"} < set(hub.repositories["me/flowers"])


def test_configs_reveal_nothing_about_the_machine(finished_run, make_model, tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "my vaes" / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "my vaes" / "vae")
    pipe = SDTPipeline(make_model(in_channels=4), FlowMatchEulerDiscreteScheduler(), vae)
    pipe.save_pretrained(finished_run.folder)
    config = finished_run.folder / "vae" / "config.json"
    assert str(tmp_path) in config.read_text()  # diffusers notes where it loaded the VAE from
    share_folder(HubArguments(), finished_run.folder)
    for path in finished_run.folder.rglob("*"):
        assert path.suffix not in (".json", ".md") or str(tmp_path) not in path.read_text()
    assert json.loads(config.read_text())["_name_or_path"] == ".../vae"
    again = DiffusionPipeline.from_pretrained(finished_run.folder)
    assert fingerprint(again.transformer, again.vae) == fingerprint(pipe.transformer, vae)


def test_without_push_to_hub_nothing_is_asked_of_it(hub, finished_run):
    share_folder(HubArguments(), finished_run.folder)
    assert hub.requests == []
    assert (finished_run.folder / "README.md").is_file()


def test_the_repository_has_the_folders_name_by_default_and_may_be_private(hub, tmp_path):
    assert create_hub_repo(arguments(hub_model_id=None, hub_private_repo=True), tmp_path / "roses") == "me/roses"
    assert hub.private == {"me/roses": True}
    assert create_hub_repo(arguments(hub_model_id="me/roses"), tmp_path) == "me/roses"  # it may be there already


@pytest.mark.parametrize("wrong", [{"hub_model_id": "others/flowers"}, {"hub_token": "hf_another"}])
def test_a_repository_that_may_not_be_written_is_refused(hub, tmp_path, wrong):
    with pytest.raises(ValueError, match=r"push_to_hub: the repository .*/flowers cannot be made or opened"):
        create_hub_repo(arguments(**wrong), tmp_path)


def test_a_hub_that_does_not_answer_is_refused(monkeypatch, tmp_path):
    with HubStandIn() as gone:
        gone.replace_the_hub(monkeypatch)
    with pytest.raises(ValueError, match=r"push_to_hub: the repository me/flowers cannot be made or opened"):
        create_hub_repo(arguments(), tmp_path)


def test_offline_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="offline mode is enabled"):
        create_hub_repo(arguments(), tmp_path)


def test_bad_names_and_missing_tokens_are_refused_before_anything(monkeypatch):
    with pytest.raises(ValueError, match=r"^hub_model_id: .*a/b/c"):
        arguments(hub_model_id="a/b/c")
    monkeypatch.setattr("sdt_diffusion.hub.push.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"log in by `hf auth login`, set HF_TOKEN, or give hub_token"):
        arguments(hub_token=None)
    assert dataclasses.asdict(HubArguments())["push_to_hub"] is False  # without pushing it takes neither


def test_a_push_that_fails_says_how_to_repeat_it(hub, finished_run):
    hub.full = True
    with pytest.raises(OSError, match=r"To push again: python train/share.py --folder .*flowers --push_to_hub"):
        share_folder(arguments(), finished_run.folder)
    assert (finished_run.folder / "README.md").is_file()


def test_code_is_shared_and_the_card_says_so(finished_run):
    main(["--folder", str(finished_run.folder), "--with_code", "True"])
    assert {"pipeline_sdt.py", "transformer/transformer_sdt.py"} < set(files_to_share(finished_run.folder))
    card = (finished_run.folder / "README.md").read_text()
    assert "trust_remote_code=True)" in card
    assert "import sdt_diffusion" not in card
