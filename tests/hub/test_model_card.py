import json
import re

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from sdt_diffusion.hub import write_model_card
from tests.hub.test_results import FID, SAMPLER


@pytest.fixture
def with_fid(finished_run):
    fid = {**FID, "samples": {**FID["samples"], "model_weights": finished_run.record["weights"]}}
    (finished_run.folder / "fid.json").write_text(json.dumps(fid))
    return finished_run


def test_the_card_tells_of_data_model_training_and_results(with_fid):
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


def test_a_card_of_someone_elses_making_is_left_alone(finished_run):
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
    assert f'pipeline("image-classification", model={json.dumps(str(folder))})' in path.read_text()
