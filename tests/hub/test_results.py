import json
import warnings

import pytest

from sdt_diffusion.hub.results import READERS, kind_of, read_results

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


def test_paths_of_the_machine_are_not_recorded(read, tmp_path):
    reference = {"path": f"{tmp_path}/imagenet.npz", "count": 10_000}
    fid, _ = read(fid={**FID, "kind": "fid", "reference": reference})
    assert fid.data == ".../imagenet.npz, 10000 images"


def test_what_training_found(read):
    (result,) = read(
        results={"label_accuracy": 0.999, "num_images": 1000, "num_real_images": 1797, "sampler": SAMPLER}
    )
    assert (result.metric, result.shown, result.how) == ("label accuracy", "99.9%", SAMPLER)
    for results in (
        {"test_accuracy": 0.9, "test_accuracy_top5": 1.0, "test_images": 360},
        {"kind": "classifier_training", "test_accuracy": 0.9, "test_accuracy_top5": 1.0, "test_images": 360},
        {"kind": "classifier_training", "top1": 0.9, "top5": 1.0, "test_images": 360},
        {"kind": "classifier_training", "top1": 0.9, "top5": 1.0, "loss": 0.4, "count": 360},
    ):
        top1, top5 = read(results=results)
        assert (top1.metric, top1.shown, top1.images) == ("top-1 accuracy", "90.00%", 360)
        assert (top5.metric, top5.shown, top5.images) == ("top-5 accuracy", "100.00%", 360)


def test_a_kind_decides_and_older_files_are_known_by_their_keys():
    accuracy = {"top1": 0.75, "top5": None, "classes": [], "data": {}}
    label_accuracy = {"label_accuracy": 0.999, "num_images": 1000, "num_real_images": 1797, "sampler": SAMPLER}
    training = {"test_accuracy": 0.9, "test_accuracy_top5": 1.0, "test_images": 360}
    older = {"fid": FID, "accuracy": accuracy, "label_accuracy": label_accuracy, "classifier_training": training}
    assert {kind: kind_of(content) for kind, content in older.items()} == {kind: kind for kind in older}
    assert set(older) == set(READERS)
    for content in older.values():
        assert kind_of({**content, "kind": "samples"}) == "samples"
    assert kind_of({"_class_name": "SDTPipeline"}) is kind_of([1]) is kind_of({"kind": [1]}) is None


def test_other_kinds_hold_no_numbers_for_the_card(read):
    assert read(samples={**FID, "kind": "samples"}, record={"kind": "training_run"}) == []


@pytest.mark.parametrize("kind", sorted(READERS))
def test_a_file_that_lacks_what_its_kind_has_is_named(read, kind):
    with pytest.raises(ValueError, match=r"broken.json is damaged \(it has no '\w+'\)"):
        read(broken={"kind": kind, "top1": 0.5, "labels": {"fid": "FID"}, "fid": 1, "samples": {}})


def test_a_classifiers_accuracy(read):
    record = {"top1": 0.75, "top5": None, "classes": [], "data": {"dataset": "birds", "split": "test", "count": 8}}
    (result,) = read(accuracy={**record, "model": {"weights": "abc"}, "throughput": {"dtype": "float32"}})
    assert (result.metric, result.shown, result.data, result.images) == ("top-1 accuracy", "75.00%", "birds (test)", 8)


def test_numbers_of_other_weights_are_left_out(read):
    other = {**FID, "samples": {**FID["samples"], "model_weights": "def"}}
    with pytest.warns(UserWarning, match=r"fid.json was measured with other weights"):
        assert read(fid=other) == []
    rounded = {**other, "samples": {**other["samples"], "dtype": "float16"}}  # whose fingerprint says nothing
    with warnings.catch_warnings(action="error"):
        assert len(read(fid=rounded)) == 2


def test_other_json_files_are_passed_over_and_damaged_ones_named(read, tmp_path):
    assert read(model_index={"_class_name": "SDTPipeline"}, a_list=[1, 2]) == []
    (tmp_path / "fid.json").write_text("{")
    with pytest.raises(ValueError, match=r"fid.json is damaged"):
        read()
