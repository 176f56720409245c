"""Test the code that folders carry: it is what the package does, where the package is not."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders  # has no public name
from transformers import AutoModelForImageClassification

from sdt_diffusion import FlowMatchSDEScheduler, SDTGuidance, SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.classification import (
    SDTClassifierConfig,
    SDTForImageClassification,
    SDTHForImageClassification,
    SDTHImageProcessor,
    SDTHModel,
)
from sdt_diffusion.probe import Backbone
from sdt_diffusion.sdt.loading import open_pipeline
from sdt_diffusion.sdt.presets import PLUS
from sdt_diffusion.utils.code_export import TRANSFORMERS_CLASSES, bundle, write_code
from tests.sdt_h.small import small_model

LOAD = Path(__file__).with_name("load_without_package.py")


def samples(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(["bee", 4], num_inference_steps=3, generator=generator, output_type="pt").images


@pytest.fixture
def folders(make_pipe, make_model, tmp_path):
    """Two pipelines, a classifier and a head with their code, and what they compute with the package."""
    guider = SDTGuidance.from_kind("autoguidance", guidance_scale=2.0, guidance_interval=(0.2, 0.9))
    pipes = {
        "plain": make_pipe(transformer=make_model(**PLUS, adaln="low_rank", num_registers=2, long_skips=True)),
        "guided": make_pipe(
            FlowMatchSDEScheduler(shift=2.0), guider=guider, guide_transformer=make_model(num_layers=1)
        ),
    }
    torch.manual_seed(0)
    backbone = Backbone(pipes["plain"].transformer, pipes["plain"].scheduler, None)
    probe = SDTForImageClassification.from_backbone(backbone, id2label={0: "cat", 1: "dog"}).eval()
    classifier = small_model()
    processor = SDTHImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    for name, part in {**pipes, "classifier": classifier, "probe": probe}.items():
        part.save_pretrained(tmp_path / name, with_code=True)
    processor.save_pretrained(tmp_path / "classifier", with_code=True)
    pipes["plain"].save_pretrained(tmp_path / "bare")
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = SDTHModel.from_pretrained(tmp_path / "classifier").eval()
    image = torch.arange(3 * 40 * 40, dtype=torch.uint8).reshape(3, 40, 40)
    return tmp_path, {
        **{name: samples(pipe) for name, pipe in pipes.items()},
        "logits": classifier(inputs).logits.detach(),
        "probe": probe(inputs[:, :, :8, :8]).logits.detach(),
        "features": features(inputs).pooler_output.detach(),
        "pixels": processor(image, return_tensors="pt").pixel_values,
    }


def test_folders_load_where_the_package_is_not_installed(folders, tmp_path):
    folder, expected = folders
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    names = [folder / name for name in ("plain", "guided", "classifier", "probe", "bare", "results.pt")]
    process = subprocess.run(
        [sys.executable, LOAD, *names], env=environment, capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stderr
    found = torch.load(folder / "results.pt")
    assert found["modules"] == []
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert torch.equal(found["custom"], found["plain"])
    swapped = SDTPipeline.from_pretrained(folder / "plain")
    assert "Make one that fits: pipe.swap_scheduler('UniPCMultistepScheduler')" in found["misfit"]
    for name in ("UniPCMultistepScheduler", "FlowMatchSDEScheduler"):
        swapped.swap_scheduler(name)
        torch.testing.assert_close(found[name], samples(swapped), rtol=1e-4, atol=1e-5)
    assert torch.equal(found["swapped_again"], found["FlowMatchSDEScheduler"])
    assert torch.equal(found["again"], found["guided"])  # saved there, with its code
    assert all("trust_remote_code=True" in message for message in found["refusals"])
    pipeline_error, model_error = found["without_code"]
    assert pipeline_error == "module diffusers has no attribute SDTPipeline"  # diffusers' own; the card explains it
    assert "import sdt_diffusion" in model_error  # the name to install
    assert found["saved"]["AutoModelForImageClassification"] == "modeling_sdt_h.SDTHForImageClassification"
    assert "might require" not in process.stderr  # no optional package of ours is asked for
    # What was saved there loads with the package again.
    pipe = SDTPipeline.from_pretrained(folder / "results.pt.again")
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(samples(pipe), expected["guided"])
    assert type(pipe.guider) is SDTGuidance


def test_with_the_package_our_classes_stand_for_those_in_the_folder(make_pipe, tmp_path):
    pipe = make_pipe(FlowMatchSDEScheduler(), guider=SDTGuidance(2.0))
    pipe.save_pretrained(tmp_path)
    write_code(tmp_path)
    for loaded in (SDTPipeline.from_pretrained(tmp_path), open_pipeline(str(tmp_path))):
        assert type(loaded.transformer) is SDTTransformer2DModel
        assert type(loaded.guider) is SDTGuidance
        assert type(loaded.scheduler) is FlowMatchSDEScheduler
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_a_classifier_saved_elsewhere_does_not_name_code_that_is_not_there(tmp_path):
    small_model().save_pretrained(tmp_path / "classifier")
    write_code(tmp_path / "classifier")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier")
    assert type(model) is SDTHForImageClassification  # the package's own, without trust
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_writing_again_changes_nothing(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path)
    first = {path: path.read_text() for path in write_code(tmp_path)}
    index = (tmp_path / "model_index.json").read_text()
    assert {path: path.read_text() for path in write_code(tmp_path)} == first
    assert (tmp_path / "model_index.json").read_text() == index


def test_a_bundle_holds_each_definition_once_and_nothing_of_the_package():
    for module, classes in TRANSFORMERS_CLASSES.values():
        tree = ast.parse(bundle([(module, name) for name in classes]))
        defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert len(set(defined)) == len(defined)
        assert set(classes) <= set(defined)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert all(node.level == 0 and not node.module.startswith("sdt_diffusion") for node in imports)


def test_a_name_that_a_module_lacks_is_refused():
    with pytest.raises(ValueError, match=r"sdt_diffusion\.norms has no build_nrom"):
        bundle([("sdt_diffusion.norms", "build_nrom")])


def test_two_definitions_of_one_name_are_refused():
    with pytest.raises(ValueError, match="RANGES has two meanings"):
        bundle([("sdt_diffusion.sdt.config_ranges", "RANGES"), ("sdt_diffusion.sdt_h.network", "RANGES")])


def test_every_model_for_transformers_has_code():
    assert set(TRANSFORMERS_CLASSES) == {"sdt_h", SDTClassifierConfig.model_type}


def test_diffusers_downloads_the_code_of_every_part(make_pipe, make_model, tmp_path):
    """By the functions with which `DiffusionPipeline.download` chooses among the files on the Hub."""
    guider = SDTGuidance.from_kind("autoguidance")
    pipe = make_pipe(FlowMatchSDEScheduler(), guider=guider, guide_transformer=make_model())
    pipe.save_pretrained(tmp_path)
    write_code(tmp_path)
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    index = json.loads((tmp_path / "model_index.json").read_text())
    code, _ = _get_custom_components_and_folders("me/model", index, files)
    assert code == {
        "transformer": "transformer_sdt",
        "guide_transformer": "transformer_sdt",
        "guider": "pipeline_sdt",
        "scheduler": "flow_sde",
    }
    assert f"{index['_class_name'][0]}.py" in files
    # The package reads the index on the Hub by this method.
    assert SDTPipeline._dict_from_json_file(tmp_path / "model_index.json")["guider"] == [
        "sdt_diffusion",
        "SDTGuidance",
    ]


def test_saving_with_code_writes_what_write_code_does(make_pipe, tmp_path):
    pipe, model, processor = make_pipe(), small_model(), SDTHImageProcessor()
    for part, name in ((pipe, "pipe"), (model, "classifier"), (processor, "classifier")):
        part.save_pretrained(tmp_path / "at_once" / name, with_code=True)
        part.save_pretrained(tmp_path / "later" / name)
    for name in ("pipe", "classifier"):
        write_code(tmp_path / "later" / name)
    at_once, later = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "at_once", tmp_path / "later")
    )
    assert at_once == later


def test_code_that_an_upload_would_lack_is_refused_before_anything_is_written(make_pipe, tmp_path):
    for part in (make_pipe(), small_model(), SDTHImageProcessor()):
        with pytest.raises(ValueError, match="save first, then `hf upload` the folder"):
            part.save_pretrained(tmp_path, with_code=True, push_to_hub=True)
    assert not any(tmp_path.iterdir())


def test_a_processor_with_code_needs_the_model_beside_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither a pipeline"):
        SDTHImageProcessor().save_pretrained(tmp_path, with_code=True)


def test_code_that_was_imported_from_a_file_writes_none(make_pipe, tmp_path, monkeypatch):
    make_pipe().save_pretrained(tmp_path, with_code=True)
    spec = importlib.util.spec_from_file_location("pipeline_sdt", tmp_path / "pipeline_sdt.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pipeline_sdt", module)
    spec.loader.exec_module(module)
    pipe = module.SDTPipeline(make_pipe().transformer, make_pipe().scheduler)
    with pytest.raises(ValueError, match=r"needs the package sdt_diffusion, or .* trust_remote_code=True"):
        pipe.save_pretrained(tmp_path / "again", with_code=True)
    assert not (tmp_path / "again").exists()


def test_folders_of_others_are_refused(make_pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither a pipeline"):
        write_code(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="its model_type is 'vit'"):
        write_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ["sdt_h"]}')
    with pytest.raises(ValueError, match="its model_type is"):
        write_code(tmp_path)
    folder = tmp_path / "pipe"
    make_pipe().save_pretrained(folder)
    index = folder / "model_index.json"
    for part, kind in (
        ("..", "SDTTransformer2DModel"),
        ("../outside", "SDTTransformer2DModel"),
        ("guider", "SDTGuidance"),
    ):
        index.write_text(json.dumps({"_class_name": "SDTPipeline", part: ["sdt", kind], "vae": ["sdt", [1]]}))
        with pytest.raises(ValueError, match=f"is not whole: there is no {part}"):
            write_code(folder)
    index.write_text(json.dumps({"_class_name": "DiTPipeline"}))
    with pytest.raises(ValueError, match="holds a DiTPipeline, not an SDTPipeline"):
        write_code(folder)
