import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from sdt_diffusion.data.raw_images import RawImageArguments, open_images
from sdt_diffusion.evaluation import fid
from sdt_diffusion.evaluation.fid import FidArguments, FidSamplingArguments, compare
from sdt_diffusion.metrics.extraction import summarize
from sdt_diffusion.metrics.extractors import build_extractor
from sdt_diffusion.metrics.features import save_summary

PIXELS = build_extractor("pixels")
SAMPLING = {"num_samples": 30, "num_inference_steps": 2, "batch_size": 8}


def evaluate(output, sampling=None, **arguments):
    arguments = {"kid_subset_size": 20, "kid_subsets": 3, **arguments}
    args = FidArguments(output=output, **{name: value for name, value in arguments.items() if name != "image_args"})
    image_args = arguments.get("image_args", RawImageArguments())
    table = compare(args, FidSamplingArguments(**(sampling or {})), PIXELS, image_args)
    return json.loads(output.read_text()), table


def metrics_of(record):
    return {key: value for key, value in record.items() if not isinstance(value, (dict, list))}


def gray_images(folder, count=25, side=8):
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(1).integers(0, 256, (count, side, side), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def save_statistics(path, folder, num_features=0, image_args=None):
    images = open_images(str(folder), image_args or RawImageArguments())
    save_summary(path, summarize(images, PIXELS, ("pool",), num_features, feature_folder=path.parent))
    return str(path)


@pytest.fixture
def real(tmp_path):
    """25 images of 8 x 8 pixels."""
    folder = tmp_path / "real"
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def model(make_pipe, tmp_path):
    make_pipe(guidance_scale=1.5).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_images_against_themselves(real, tmp_path):
    record, table = evaluate(tmp_path / "out" / "fid.json", samples=str(real), reference=str(real))
    assert record["kind"] == "fid"
    assert record["fid"] == 0
    assert (record["precision"], record["recall"]) == (1, 1)
    assert record["samples"]["count"] == record["reference"]["count"] == 25
    assert record["labels"]["fid"] == "FD(pixels)-25"
    assert "FD(pixels)-25" in table
    assert "rank-deficient" in table
    assert np.array(Image.open(tmp_path / "out" / "fid.png")).std() > 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fid.json", "fid.png"]


def test_a_pipeline_is_sampled_and_its_samples_serve_again(model, real, tmp_path):
    sampling = {"model": str(model), **SAMPLING}
    npz = tmp_path / "out" / "samples.npz"
    record, table = evaluate(tmp_path / "out" / "fid.json", sampling, reference=str(real), samples_npz=npz)
    assert record["samples"]["count"] == 30
    assert "FlowMatchEulerDiscreteScheduler, 2 steps, 4 network evaluations, guidance 1.5, seed 0" in table
    assert np.load(npz)["arr_0"].shape == (30, 8, 8, 3)
    assert record["fid"] > 0
    for source in (npz, tmp_path / "out" / "fid.samples"):
        again, _ = evaluate(tmp_path / f"{source.suffix}.json", samples=str(source), reference=str(real))
        assert metrics_of(again) == metrics_of(record)


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_saved_statistics_give_the_numbers_of_their_images(real, tmp_path, ending):
    from sdt_diffusion.data.raw_images import FolderImages

    saved = tmp_path / f"reference.{ending}"
    save_summary(saved, summarize(FolderImages(real), PIXELS, ("pool",), 22, feature_folder=tmp_path))
    arguments = {"samples": str(real), "num_features": 22}
    first, _ = evaluate(tmp_path / "a.json", reference=str(saved), **arguments)
    second, _ = evaluate(tmp_path / "b.json", reference=str(real), **arguments)
    assert metrics_of(first) == metrics_of(second)
    assert first["settings"]["reference_features"] == 22
    assert first["reference"]["images"] == ".../real"


def test_adms_reference_serves_with_its_images(real, tmp_path):
    from sdt_diffusion.data.raw_images import FolderImages

    images = FolderImages(real)
    gaussian = summarize(images, PIXELS).statistics["pool"]
    arrays = {"mu": gaussian.mean, "sigma": gaussian.covariance, "arr_0": np.stack([images[i] for i in range(25)])}
    np.savez(tmp_path / "VIRTUAL.npz", **arrays)
    record, table = evaluate(tmp_path / "a.json", samples=str(real), reference=str(tmp_path / "VIRTUAL.npz"))
    assert (record["fid"], record["precision"], record["recall"]) == (0, 1, 1)
    assert "are not verified" in table


def test_a_reference_of_another_size_is_named(model, real, tmp_path):
    np.savez(tmp_path / "r.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match=r"r.npz: its pool features have 7 dimensions, those of the samples 192"):
        evaluate(tmp_path / "a.json", samples=str(real), reference=str(tmp_path / "r.npz"), metrics=["fid"])


def test_arguments_without_effect_are_refused(real, tmp_path):
    np.savez(tmp_path / "r.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "i.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    for name in ("r.npz", "i.npz"):
        with pytest.raises(ValueError, match=f"resolution has no effect on .*{name}"):
            evaluate(
                tmp_path / "a.json",
                samples=str(tmp_path / "i.npz"),
                reference=str(tmp_path / name),
                image_args=RawImageArguments(resolution=8),
            )


@pytest.mark.parametrize("statistics", [True, False], ids=["statistics", "arrays"])
def test_with_a_saved_reference_mode_and_resolution_prepare_the_samples(tmp_path, statistics):
    folder, reference = gray_images(tmp_path / "gray", side=10), tmp_path / "reference.npz"
    how = RawImageArguments(image_mode="L", resolution=8)
    if statistics:
        save_statistics(reference, folder, image_args=how)
    else:
        images = open_images(str(folder), how)
        np.savez(reference, arr_0=np.stack([images[i] for i in range(len(images))]))
    same = {"samples": str(folder), "reference": str(reference)}
    record, _ = evaluate(tmp_path / "a.json", **same, image_args=how)
    assert record["fid"] == 0
    assert record["samples"]["shape"] == [8, 8, 1]
    with pytest.raises(ValueError, match="its mode is L, not RGB"):
        evaluate(tmp_path / "b.json", **same)


def test_metrics_for_which_a_reference_holds_nothing_are_left_out_with_a_note(real, tmp_path):
    reference = save_statistics(tmp_path / "reference.npz", real)
    record, table = evaluate(tmp_path / "a.json", samples=str(real), reference=reference)
    assert list(record["labels"]) == ["fid"]
    assert [note.partition(",")[0] for note in record["warnings"][:3]] == [
        f"Left out: {name} needs features" for name in ("precision", "recall", "kid")
    ]
    assert "Left out: kid needs features" in table
    with pytest.raises(ValueError, match=r"metrics: kid needs features, and .*reference\.npz has none"):
        evaluate(tmp_path / "b.json", samples=str(real), reference=reference, metrics=["fid", "kid"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "small.npz"}, r"small\.npz: its pool features have 7 dimensions, those of the samples 192"),
        ({"reference": "larger"}, "larger: its pool features have 300 dimensions, those of the samples 192"),
        ({"reference": "nan.npz"}, r"nan\.npz: mu and sigma: The statistics hold values that are NaN"),
        ({"reference": "skew.npz"}, r"skew\.npz: mu and sigma: The covariance is not symmetric"),
        ({"samples_npz": "file/a.npz"}, "No file can be written there"),
        ({"sampling": {"samples_dir": "file"}}, "No file can be written there"),
        ({"sampling": {"num_samples": 999_999}}, "What this evaluation keeps there will take about"),
    ],
)
def test_what_can_be_known_is_known_before_anything_is_sampled(model, real, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(fid, "draw_samples", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(fid, "summarize", lambda *_, **__: pytest.fail("too late"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: mock.Mock(free=100_000_000))
    monkeypatch.chdir(tmp_path)
    gray_images(tmp_path / "larger", side=10)
    (tmp_path / "file").touch()
    np.savez("small.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez("nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    np.savez("skew.npz", mu=np.zeros(192), sigma=np.triu(np.ones((192, 192))))
    sampling = {"model": str(model), **SAMPLING, **change.pop("sampling", {})}
    paths = {key: Path(value) if key == "samples_npz" else value for key, value in change.items()}
    image_args = RawImageArguments(image_mode="L" if change.get("reference") == "larger" else None)
    arguments = {"reference": str(real), "metrics": ["fid"], "image_args": image_args, **paths}
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(tmp_path / "a.json", sampling, **arguments)
    assert not (tmp_path / "a.json").exists()


def test_a_damaged_model_an_unfit_extractor_and_an_image_that_differs_are_one_line(model, real, tmp_path):
    output = tmp_path / "a.json"
    flags = ["--reference", real, "--extractor", "pixels", "--metrics", "fid", "--output", output]
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((4, 64, 64, 3), np.uint8))
    np.savez(tmp_path / "none.npz", x=np.zeros(3))
    shutil.copytree(real, tmp_path / "mixed")
    Image.new("RGB", (9, 8)).save(tmp_path / "mixed" / "7.png")
    (model / "transformer" / "config.json").write_text("{")
    for source, message in (
        (["--model", model], "model"),
        (["--samples", tmp_path / "large.npz"], "The extractor pixels does not take images of 64x64 pixels"),
        (["--samples", tmp_path / "none.npz"], "has no array arr_0"),
        (["--samples", tmp_path / "mixed"], "it has 9x8 pixels"),
        (["--samples", tmp_path / "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit) as error:
            fid.main(list(map(str, [*source, *flags])))
        assert str(error.value).startswith("Error: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert not output.exists()


@pytest.mark.parametrize("name", ["num_features", "inception_splits", "kid_subsets", "kid_subset_size"])
@pytest.mark.parametrize("value", [-1, 0, 0.5, float("nan"), float("inf"), 10**30])
def test_numbers_that_make_no_sense_are_refused_by_the_arguments(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        FidArguments(reference="r", output=tmp_path / "a.json", **{name: value})
    with pytest.raises(ValueError, match="num_samples"):
        FidSamplingArguments(num_samples=value)


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "compare", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="130"):
        fid.main(["--samples", "s", "--reference", "r", "--extractor", "pixels", "--output", str(tmp_path / "a.json")])
    assert capsys.readouterr().err.splitlines()[-1] == "Stopped by Ctrl-C."


def test_random_labels_follow_from_the_seed(model, real, tmp_path):
    sampling = {"model": str(model), **SAMPLING, "class_labels": "random"}
    evaluate(tmp_path / "a.json", sampling, reference=str(real), metrics=["fid"])
    labels = json.loads((tmp_path / "a.samples" / "manifest.json").read_text())["class_labels"]
    assert sorted(set(labels)) == [0, 1, 2, 3, 4]
    assert labels[:5] != [0, 1, 2, 3, 4]


def test_some_of_the_samples_may_be_taken(real, tmp_path):
    record, _ = evaluate(
        tmp_path / "a.json", {"num_samples": 10}, samples=str(real), reference=str(real), metrics=["recall"]
    )
    assert record["samples"]["count"] == 10
    assert record["samples"]["drawn_from"] == 25


def test_default_metrics_that_need_more_images_are_left_out_with_a_note(real, tmp_path):
    record, table = evaluate(tmp_path / "a.json", samples=str(real), reference=str(real), kid_subset_size=1000)
    assert sorted(record["labels"]) == ["fid", "precision", "recall"]
    assert "kid takes at least 1000 samples" in record["warnings"][0]
    assert "note" in table
    assert "Left out:" in table
    three = {"samples": str(real), "reference": str(real), "sampling": {"num_samples": 3}}
    record, _ = evaluate(tmp_path / "b.json", **three)
    assert list(record["labels"]) == ["fid"]
    assert [warning.split(" takes")[0].split()[-1] for warning in record["warnings"][:3]] == [
        "precision",
        "recall",
        "kid",
    ]
    with pytest.raises(ValueError, match="precision takes at least 4 samples"):
        evaluate(tmp_path / "c.json", **three, metrics=["fid", "precision"])
    with pytest.raises(ValueError, match="fid takes at least 2 samples"):
        evaluate(tmp_path / "c.json", **{**three, "sampling": {"num_samples": 1}})


def test_settings_of_the_pipeline_apply_and_missing_ones_are_noted(make_pipe, real, tmp_path):
    arguments = {"reference": str(real), "metrics": ["fid"]}
    for name, saved in (("saved", {"guidance_scale": 1.25, "num_inference_steps": 2}), ("bare", {})):
        make_pipe(**saved).save_pretrained(tmp_path / name)
    sampling = {"model": str(tmp_path / "saved"), "num_samples": 5, "attention_backend": "dense"}
    record, _ = evaluate(tmp_path / "a.json", sampling, **arguments)
    assert "2 steps, 4 network evaluations, guidance 1.25" in record["samples"]["sampler"]
    assert record["samples"]["attention_backend"] == "dense"
    assert not any("guidance_scale" in warning for warning in record["warnings"])
    assert not any("samples of 5 classes" in warning for warning in record["warnings"])
    sampling = {"model": str(tmp_path / "bare"), "num_samples": 7, "num_inference_steps": 2}
    record, _ = evaluate(tmp_path / "b.json", sampling, **arguments)
    assert "The pipeline has no guidance_scale saved: 4 was used; FIDs are best at about 1.5." in record["warnings"]
    assert "7 samples of 5 classes: the first 2 have one sample more." in record["warnings"]
    record, _ = evaluate(tmp_path / "c.json", {**sampling, "guidance_scale": 1.0}, **arguments)
    assert not any("guidance_scale" in warning for warning in record["warnings"])


def test_bad_requests_are_refused_before_anything_is_written(model, real, tmp_path):
    output = tmp_path / "out.json"
    sampling = {"model": str(model), **SAMPLING}
    for arguments, message in [
        ({"reference": str(real)}, "Give either model, to sample from, or samples"),
        ({"reference": str(real), "samples": str(real), "metrics": ["sfid"]}, "metrics: sfid needs spatial features"),
        (
            {"reference": str(real), "samples": str(real), "kid_subset_size": 26, "metrics": ["fid", "kid"]},
            "kid takes at least 26 samples",
        ),
        ({"reference": str(tmp_path / "no"), "samples": str(real)}, "There is no file or folder"),
        ({"reference": str(real), "samples": str(real), "samples_npz": tmp_path / "a.zip"}, r"must end in .npz"),
        ({"reference": str(real), "samples": str(real), "sampling": sampling}, "Give either model"),
        ({"reference": str(real), "samples": str(real), "sampling": {"seed": 3}}, "seed is for sampling from a model"),
        ({"reference": str(real), "sampling": {"model": "./no"}}, "model: ./no holds no pipeline"),
        (
            {"reference": str(real), "samples": str(real), "output": real / "0.png" / "a.json"},
            "No file can be written",
        ),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            evaluate(**{"output": output, **arguments})
    output.write_text("precious")
    with pytest.raises(ValueError, match=r"out.json exists already"):
        evaluate(output, samples=str(real), reference=str(real))
    assert output.read_text() == "precious"
    output.rename(output.with_suffix(".png"))
    with pytest.raises(ValueError, match=r"out.png exists already"):
        evaluate(output, samples=str(real), reference=str(real))
    output.with_suffix(".png").rename(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.json", "real"]
