import json
import warnings

import pytest

from sdt_diffusion.hub.results import read_results

SAMPLER = "DDIMScheduler, 250 steps, 500 network evaluations, guidance 1.5, seed 0"
FID = {
    "fid": 2.27123456,
    "kid": 0.001,
    "kid_std": 0.0002,
    "labels": {"fid": "FID-50k", "kid": "KID-50k"},
    "samples": {"count": 50_000, "sampler": SAMPLER, "model_weights": "abc", "dtype": "float32"},
    "reference": {"path": "imagenet.npz", "count": 10_000},
    "settings": {},
}


@pytest.fixture
def read(tmp_path):
    def write_and_read(**files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return read_results(tmp_path, weights="abc")

    return write_and_read


def test_every_number_has_its_sampler_and_network_evaluations(read):
    fid, kid = read(fid=FID)
    assert (fid.metric, fid.shown, fid.images, fid.how) == ("FID-50k", "2.27123", 50_000, SAMPLER)
    assert (fid.data, fid.file) == ("imagenet.npz, 10000 images", "fid.json")
    assert kid.shown == "0.001 ± 0.0002"


def test_what_training_found(read):
    (result,) = read(
        results={"label_accuracy": 0.999, "num_images": 1000, "num_real_images": 1797, "sampler": SAMPLER}
    )
    assert (result.metric, result.shown, result.how) == ("label accuracy", "99.9%", SAMPLER)
    top1, top5 = read(results={"test_accuracy": 0.9, "test_accuracy_top5": 1.0, "test_images": 360})
    assert (top1.shown, top1.images, top5.shown) == ("90.00%", 360, "100.00%")
    numbers = {"kind": "classifier_training", "top1": 0.8, "top5": None, "loss": 0.4, "count": 36}
    (top1,) = read(results=numbers)
    assert (top1.shown, top1.images, top1.data) == ("80.00%", 36, "held-out images")


def test_a_classifiers_accuracy(read):
    record = {"top1": 0.75, "top5": None, "classes": [], "data": {"dataset": "birds", "split": "test", "count": 8}}
    (result,) = read(accuracy={**record, "model": {"weights": "abc"}, "throughput": {"dtype": "float32"}})
    assert (result.metric, result.shown, result.data, result.images) == ("top-1 accuracy", "75.00%", "birds (test)", 8)


def test_numbers_of_other_weights_are_left_out(read):
    other = {**FID, "samples": {**FID["samples"], "model_weights": "def"}}
    with pytest.warns(UserWarning, match=r"fid.json is of other weights"):
        assert read(fid=other) == []
    rounded = {**other, "samples": {**other["samples"], "dtype": "float16"}}  # whose fingerprint says nothing
    with warnings.catch_warnings(action="error"):
        assert len(read(fid=rounded)) == 2


def test_other_json_files_are_passed_over_and_damaged_ones_named(read, tmp_path):
    assert read(model_index={"_class_name": "SDTPipeline"}, a_list=[1, 2]) == []
    (tmp_path / "fid.json").write_text("{")
    with pytest.raises(ValueError, match=r"fid.json is damaged"):
        read()
