import json
import re
from email.message import Message

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from sdt_diffusion.hub import HubArguments, command_of, derive_record, describe_run, share_run, write_model_card
from sdt_diffusion.hub.run_record import write_record
from tests.hub.flowers import CONFIG, FiveImages
from tests.hub.test_results import FID, SAMPLER


@pytest.fixture
def with_fid(finished_run):
    fid = {**FID, "samples": {**FID["samples"], "model_weights": finished_run.record["weights"]}}
    (finished_run.folder / "fid.json").write_text(json.dumps(fid))
    return finished_run


def test_the_card_describes_data_model_training_and_results(with_fid):
    text = write_model_card(with_fid.folder).read_text()
    for said in (
        "accelerate launch train/train_dit.py --dataset flowers",
        "trained on 40 images of 5 classes (flowers)",
        "| parameters | " + f"{sum(p.numel() for p in with_fid.pipe.transformer.parameters()):,} |",
        "| attention | `spatial_decay` context |",
        "| steps | 100 of 4 images |",
        "| images seen | 400 (10 epochs) |",
        "| precision | bf16 |",
        "| weights | averaged, ramped decay 0.999 |",
        f"| FID-50k | 2.27123 | 50,000 | {SAMPLER} | imagenet.npz, 10000 images | [fid.json](fid.json) |",
        "![samples](samples.png)",
        "num_inference_steps: 2\n",
    ):
        assert said in text


def test_the_front_matter_is_the_hubs(with_fid):
    data = ModelCard.load(write_model_card(with_fid.folder, name="me/flowers", license="mit")).data
    assert (data.library_name, data.license, data.datasets) == ("diffusers", "mit", ["flowers"])
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.model_name == "flowers"
    first = data.eval_results[0]
    assert (first.metric_type, first.metric_value) == ("FID-50k", FID["fid"])
    assert first.metric_name == f"FID-50k, {SAMPLER}, on imagenet.npz, 10000 images"


def test_no_license_and_no_results_are_claimed(finished_run):
    path = write_model_card(finished_run.folder)
    assert ModelCard.load(path).data.license is None
    assert "model-index" not in path.read_text()
    assert "None yet." in path.read_text()


def test_the_snippet_runs(finished_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = write_model_card(finished_run.folder).read_text()
    assert 'from_pretrained("flowers")' in text
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert Image.open("sample.png").size == (8, 8)


def snippet_call(folder):
    return re.search(r"images = pipe\((.*)\)\.images", write_model_card(folder).read_text())[1]


def test_the_snippet_names_classes_and_only_settings_that_are_not_saved(finished_run, make_pipe):
    folder = finished_run.folder
    labels = '["ant", "bee", "cat", "dog"]'
    assert snippet_call(folder) == f"{labels}, guidance_scale=1.5, num_inference_steps=2"
    make_pipe(guidance_scale=1.5, num_inference_steps=2).save_pretrained(folder)
    assert snippet_call(folder) == labels
    make_pipe(num_inference_steps=2).save_pretrained(folder)
    assert snippet_call(folder) == f"{labels}, guidance_scale=1.5"


def test_classes_without_a_unique_name_are_ids_in_the_snippet(finished_run, make_pipe):
    folder = finished_run.folder
    # "crane" is the whole name of two classes, "bee" a word for two.
    names = {0: "crane", 1: "bee, honey bee", 2: "crane", 3: "bee, bumble bee"}
    make_pipe(id2label=names, guidance_scale=1, num_inference_steps=1).save_pretrained(folder)
    assert snippet_call(folder) == '[0, "bee, honey bee", 2, "bee, bumble bee"]'
    make_pipe(id2label=None, guidance_scale=1, num_inference_steps=1).save_pretrained(folder)
    assert snippet_call(folder) == "[0, 1, 2, 3]"


def test_the_card_says_how_to_install_and_that_the_import_comes_first(finished_run, monkeypatch):
    text = write_model_card(finished_run.folder).read_text()
    assert "pip install" in text
    assert "`import sdt_diffusion` must come first: without it, diffusers does not know" in text
    assert "module diffusers has no attribute SDTPipeline" in text
    for urls, command in (
        (
            ["Documentation, https://docs.x", "Repository, https://x/y"],
            'pip install "sdt_diffusion @ git+https://x/y"',
        ),
        (["Documentation, https://docs.x"], "pip install -e .  # in a checkout of sdt_diffusion"),
        (None, "pip install -e .  # in a checkout of sdt_diffusion"),
    ):
        metadata = Message()
        for url in urls or []:
            metadata["Project-URL"] = url
        monkeypatch.setattr("sdt_diffusion.hub.model_card.metadata", lambda package, found=metadata: found)
        assert f"```bash\n{command}\n```" in write_model_card(finished_run.folder).read_text()


def test_without_the_import_diffusers_says_what_the_card_says(finished_run, monkeypatch):
    monkeypatch.delattr(diffusers, "SDTPipeline")  # which importing sdt_diffusion has set
    with pytest.raises(AttributeError, match="module diffusers has no attribute SDTPipeline"):
        diffusers.DiffusionPipeline.from_pretrained(finished_run.folder)


def test_the_card_and_the_record_reveal_nothing_about_the_machine(finished_run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    folder = finished_run.folder
    fid = {**FID, "kind": "fid", "reference": {"path": f"{tmp_path}/references/imagenet.npz", "count": 10}}
    fid["samples"] = {**FID["samples"], "model_weights": finished_run.record["weights"]}
    (folder / "fid.json").write_text(json.dumps(fid))
    for data in (tmp_path / "data", tmp_path / "someone" / "data", tmp_path / "cwd" / "data"):
        images = FiveImages(range(40))
        images.name = str(data)
        given = {"dataset": str(data), "output_dir": folder}
        config = {**CONFIG, "dataset": str(data), "output_dir": str(folder), "model": str(tmp_path / "model")}
        record = describe_run(
            command_of("train/train_dit.py", given, 1), config, images, [finished_run.pipe.transformer], 100, 4, 1
        )
        write_record(folder, record)
        card = write_model_card(folder).read_text()
        older = {**record, "config": config, "data": {**record["data"], "name": str(data)}}
        write_record(folder, older)  # as written before paths were shortened
        assert write_model_card(folder).read_text() == card
        for text in (json.dumps(record), card):
            assert str(tmp_path) not in text
            assert "data" in text


def test_an_average_combined_from_snapshots_has_a_card(finished_run, make_pipe, tmp_path):
    pipe = make_pipe()
    torch.nn.init.zeros_(next(pipe.transformer.parameters()))
    pipe.save_pretrained(tmp_path / "average")
    command = command_of("train/reconstruct_ema.py", {"run": "flowers"})
    changes = {"command": command, "steps": 50, "sigma_rel": 0.15, "snapshots": 9}
    record = derive_record(finished_run.folder, [pipe.transformer], changes)
    share_run(HubArguments(), tmp_path / "average", record)
    text = (tmp_path / "average" / "README.md").read_text()
    assert "averaged by the power function of sigma_rel 0.15, combined from 9 snapshots of .../flowers" in text
    assert "| steps | 50 of 4 images |" in text
    assert "train/train_dit.py --dataset flowers\npython train/reconstruct_ema.py --run flowers\n```" in text


def test_written_again_it_has_the_new_numbers_and_keeps_what_people_wrote(with_fid):
    fid_file = with_fid.folder / "fid.json"
    fid = fid_file.read_text()
    fid_file.unlink()
    path = write_model_card(with_fid.folder, license="mit")
    path.write_text(path.read_text().replace("tags:\n", "language: en\ntags:\n- flowers\n") + "\nNot for botany.\n")
    fid_file.write_text(fid)
    again = write_model_card(with_fid.folder).read_text()
    assert "FID-50k | 2.27123" in again
    assert again.endswith("\n\nNot for botany.\n")
    data = ModelCard.load(path).data
    assert (data.license, data.language) == ("mit", "en")
    assert data.tags.count("flowers") == data.tags.count("sdt_diffusion") == 1
    assert write_model_card(with_fid.folder).read_text() == again


def test_a_card_written_by_someone_else_is_kept(finished_run):
    path = finished_run.folder / "README.md"
    path.write_text("# Mine\n")
    with pytest.warns(UserWarning, match="left as it is"):
        write_model_card(finished_run.folder)
    assert path.read_text() == "# Mine\n"


def test_metadata_that_cannot_be_read_is_not_lost(finished_run):
    path = write_model_card(finished_run.folder, license="mit")
    broken = path.read_text().replace("license: mit", "license: [mit")
    path.write_text(broken)
    with pytest.raises(ValueError, match=r"README.md: the metadata above its text cannot be read"):
        write_model_card(finished_run.folder)
    assert path.read_text() == broken


def test_a_classifiers_card(finished_run):
    folder = finished_run.folder
    (folder / "model_index.json").unlink()
    (folder / "config.json").write_text("{}")
    path = write_model_card(folder)
    assert ModelCard.load(path).data.pipeline_tag == "image-classification"
    assert "An image classifier (SDT-S/2)" in path.read_text()
    assert 'pipeline("image-classification", model="flowers")' in path.read_text()
    assert "`import sdt_diffusion.classification` must come first: without it, transformers" in path.read_text()


@pytest.mark.parametrize("damage", ['{"id2label": [1]}', '{"id2label": {"one": "rose"}}', "[]", "{", "\x00"])
def test_a_damaged_pipeline_is_named_in_one_line(finished_run, damage):
    (finished_run.folder / "model_index.json").write_text(damage)
    with pytest.raises(ValueError, match=r"model_index.json|is damaged"):
        write_model_card(finished_run.folder)
