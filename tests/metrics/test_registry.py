import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdt_diffusion.data.raw_images import RawImageArguments, open_images
from sdt_diffusion.evaluation.fid import main
from sdt_diffusion.metrics.extraction import summarize
from sdt_diffusion.metrics.extractors import EXTRACTORS, FeatureExtractor, build_extractor
from sdt_diffusion.metrics.extractors.base import as_rgb
from sdt_diffusion.metrics.features import FeatureSummary, GaussianStatistics
from sdt_diffusion.metrics.registry import (
    METRICS,
    Metric,
    check_counts,
    check_metrics,
    check_reference,
    compute_metrics,
    format_table,
    label,
    warnings_about,
)

PIXELS = build_extractor("pixels")


def summary(count=50_000, dim=4, shift=0.0, **provenance):
    gaussian = GaussianStatistics(np.full(dim, shift), np.eye(dim), count)
    features = np.random.default_rng(0).random((20, dim))
    record = {"count": count, "images": "here", "format": "PNG", **PIXELS.identity, **provenance}
    return FeatureSummary({"pool": gaussian}, features, (2.0, 0.5), record)


def test_metrics_an_extractor_cannot_give_are_refused():
    check_metrics(["fid", "precision", "recall", "kid"], PIXELS)
    with pytest.raises(
        ValueError,
        match="the extractor pixels gives fid, precision, recall, kid",
    ):
        check_metrics(["fid", "sfid"], PIXELS)
    with pytest.raises(ValueError, match="metrics: there is no 'fld'; there are fid, sfid"):
        check_metrics(["fld"], PIXELS)


@pytest.mark.parametrize(
    ("metric", "samples", "reference", "message"),
    [
        ("fid", 1, 100, "fid takes at least 2 samples; there are 1"),
        ("inception_score", 9, None, r"inception_score takes at least 10 samples \(inception_splits\); there are 9"),
        ("fid", 100, 1, "fid takes at least 2 images in the reference; there are 1"),
        ("recall", 100, 3, "recall takes at least 4 images in the reference; there are 3"),
        ("kid", 999, 5000, r"kid takes at least 1000 samples \(kid_subset_size\); there are 999"),
    ],
)
def test_too_few_images_are_refused(metric, samples, reference, message):
    with pytest.raises(ValueError, match=message):
        check_counts([metric], samples, reference, inception_splits=10, kid_subset_size=1000)
    check_counts([metric], 1000, 1000, inception_splits=10, kid_subset_size=1000)


def test_statistics_of_another_extractor_are_refused():
    check_reference("r.npz", summary(), list(METRICS)[:1], PIXELS, has_images=False)
    check_reference("r.npz", FeatureSummary(summary().statistics), ["fid"], PIXELS, has_images=False)  # ADM's
    with pytest.raises(ValueError, match=r"r.npz was made by another extractor \(weights: 'abc' there, 'none' now\)"):
        check_reference("r.npz", summary(weights="abc"), ["fid"], PIXELS, has_images=False)


def test_statistics_of_another_dimension_are_refused():
    network = SimpleNamespace(name="net", dims={"pool": 5}, identity={})
    with pytest.raises(ValueError, match=r"r.npz: its pool statistics have 4 dimensions; net gives 5"):
        check_reference("r.npz", summary(), ["fid"], network, has_images=False)


def test_what_a_reference_lacks_is_named():
    bare = FeatureSummary(summary().statistics)
    with pytest.raises(ValueError, match=r"metrics: sfid needs statistics of spatial features; r.npz has none"):
        check_reference("r.npz", bare, ["sfid"], PIXELS, has_images=False)
    with pytest.raises(ValueError, match=r"kid needs features, and r.npz has none; make it by eval"):
        check_reference("r.npz", bare, ["kid"], PIXELS, has_images=False)
    check_reference("r.npz", bare, ["kid"], PIXELS, has_images=True)


def test_numbers_are_those_asked_for_under_their_names():
    values = compute_metrics(["fid", "inception_score", "recall", "kid"], summary(), summary(shift=1.0), 2, 10)
    assert list(values) == ["fid", "inception_score", "inception_score_std", "recall", "kid", "kid_std"]
    assert values["fid"] == 4
    assert values["recall"] == 1
    with pytest.raises(ValueError, match="4 and 5 dimensions"):
        compute_metrics(["fid"], summary(), summary(dim=5))


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_number_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="fid is inf: the features are too large"):
        compute_metrics(["fid"], summary(), summary(shift=1e200))


@pytest.mark.parametrize("settings", [{"kid_subsets": 0}, {"kid_subset_size": 1}, {"kid_subsets": float("nan")}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        compute_metrics(["kid"], summary(), summary(), **settings)


@pytest.mark.parametrize(
    ("name", "count", "extractor", "expected"),
    [
        ("fid", 50_000, "inception", "FID-50k"),
        ("fid", 5000, "cleanfid_clean", "FID-5k"),
        ("fid", 1797, "pixels", "FD(pixels)-1797"),
        ("precision", 50_000, "inception", "precision-50k"),
        ("kid", 2000, "inception", "KID-2k"),
        ("kid", 2000, "dinov2", "KD(dinov2)-2k"),
        ("inception_score", 2000, "classifier outputs/inception_v3", "score(classifier)-2k"),
    ],
)
def test_a_number_is_labeled_with_its_count(name, count, extractor, expected):
    named = SimpleNamespace(name=extractor, is_inception=extractor in ("inception", "cleanfid_clean"))
    assert label(name, count, named) == expected


def test_readers_are_warned():
    assert warnings_about(summary(), summary(), ["fid"]) == []
    few = summary(count=4, shape=[8, 8, 1])
    few.statistics["pool"].covariance[0, 0] = 0
    few = warnings_about(few, summary(shape=[8, 8, 3]), ["fid"])
    assert any("4 samples: not comparable with numbers of 50000" in text for text in few)
    assert any("samples' pool features is rank-deficient: rank 3 in 4 dimensions, of 4 images" in text for text in few)
    assert any("Samples are of shape (8, 8, 1)" in text for text in few)
    trusted = warnings_about(summary(), FeatureSummary(summary().statistics), ["fid"])
    assert any("are not verified" in text for text in trusted)
    mixed = warnings_about(summary(), summary(format="JPEG"), ["fid"])
    assert mixed == ["JPEG on one side (PNG against JPEG): its compression changes features too."]


def test_the_table_says_how_the_numbers_were_made():
    samples = {**summary().provenance, "sampler": "Euler, 25 steps"}
    record = {"samples": samples, "reference": {"path": "r.npz", "count": 9}, "warnings": ["careful"]}
    record["settings"] = {"reference_features": 7}
    table = format_table({"fid": 1.25, "kid": 0.5, "kid_std": 0.125}, record, PIXELS)
    lines = dict(line.split("  ", 1) for line in table.splitlines())
    assert {key.strip(): value.strip() for key, value in lines.items()} == {
        "FD(pixels)-50k": "1.25",
        "KD(pixels)-50k": "0.5 ± 0.125",
        "extractor": "pixels, weights none",
        "resize": "none",
        "samples": "50000, here",
        "sampler": "Euler, 25 steps",
        "reference": "9, r.npz",
        "its features": "7, for precision, recall and KID",
        "note": "careful",
    }


def test_a_metric_is_added_by_a_line(tmp_path, monkeypatch):
    def mmd(samples, reference, settings):
        """Squared maximum mean discrepancy under a Gaussian kernel."""
        x, y = samples.features[:].astype(float), reference.features[:].astype(float)

        def kernel(a, b):
            return np.exp(-((a[:, None] - b[None]) ** 2).sum(axis=2) / a.shape[1]).mean()

        return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)

    monkeypatch.setitem(METRICS, "mmd", Metric(mmd, features=True, title="MMD", general_title="MMD"))

    random = np.random.default_rng(0)
    for name, brightness in (("samples", 100), ("real", 150)):
        (tmp_path / name).mkdir()
        for index in range(6):
            pixels = random.integers(brightness, brightness + 100, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    arguments = ["--samples", tmp_path / "samples", "--reference", tmp_path / "real", "--extractor", "pixels"]
    main([str(word) for word in [*arguments, "--metrics", "mmd", "--output", tmp_path / "out.json"]])
    record = json.loads((tmp_path / "out.json").read_text())
    assert 0.01 < record["mmd"] < 1
    assert record["labels"] == {"mmd": "MMD(pixels)-6"}


def test_an_extractor_is_added_by_a_line(monkeypatch):
    class MeanColor(FeatureExtractor):
        """Mean and standard deviation of each channel."""

        name, resize, fingerprint = "mean_color", "none", "none"
        provides = frozenset({"pool"})

        def __init__(self, weights=None, device="cpu"):
            self.device = device

        def prepare(self, image):
            return torch.from_numpy(as_rgb(image)).float() / 255

        def __call__(self, batch):
            return {"pool": torch.cat([batch.mean(dim=(1, 2)), batch.std(dim=(1, 2))], dim=1)}

    monkeypatch.setitem(EXTRACTORS, "mean_color", MeanColor)
    images = open_images("digits", RawImageArguments())
    found = summarize(images, build_extractor("mean_color"))
    assert found.statistics["pool"].mean.shape == (6,)
    assert found.provenance["extractor"] == "mean_color"
