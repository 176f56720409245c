"""eval/accuracy.py as a user runs it."""

import json
import runpy

import pytest

from sdt_diffusion.classification import SDTHImageProcessor
from tests.scripts.process import ROOT, fork_ranks
from tests.sdt_h.small import small_model


@pytest.fixture
def flags(tmp_path):
    model = tmp_path / "model"
    small_model(num_channels=1, num_labels=10, id2label={i: str(i) for i in range(10)}).save_pretrained(model)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    SDTHImageProcessor(do_convert_rgb=False, image_mean=[0.5], image_std=[0.5], **size).save_pretrained(model)
    return ["--model", str(model), "--dataset", "digits", "--output"]


@pytest.fixture
def main():
    return runpy.run_path(str(ROOT / "eval" / "accuracy.py"))["main"]


def test_number_of_processes_and_workers_change_no_digit(tmp_path, flags, main, capsys):
    main([*flags, str(tmp_path / "one.json")])
    assert "mean of classes" in capsys.readouterr().out
    shared = fork_ranks("eval/accuracy.py", *flags, tmp_path / "two.json", "--dataloader_num_workers", "1")
    assert shared.stdout.count("mean of classes") == 1
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one.pop("throughput")["images_per_second"] > 0
    assert two.pop("throughput")["images_per_second"] > 0
    # A sum of floating-point numbers, unlike the counts, depends on their order.
    assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-12)
    assert one == two


def test_errors_are_one_line(tmp_path, flags, main):
    (tmp_path / "one.json").touch()
    with pytest.raises(SystemExit, match=r"^Error: .*one\.json exists already; give another name, or delete it\.$"):
        main([*flags, str(tmp_path / "one.json")])
