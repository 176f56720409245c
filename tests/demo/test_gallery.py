"""Test the gallery: what is in it, that it can be killed, and what it refuses."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sdt_diffusion.demo import gallery
from sdt_diffusion.demo.gallery import Gallery, GalleryArguments, cut, in_a_row, main, spaced
from sdt_diffusion.demo.gallery_page import Row, Section, render
from sdt_diffusion.sampling.generate import generate
from sdt_diffusion.sampling.settings import SamplingArguments
from sdt_diffusion.sdt.loading import open_pipeline

VARY = ["guidance_scale=1,3", "scheduler=FlowMatchHeunDiscreteScheduler"]


@pytest.fixture
def model(make_pipe, tmp_path):
    make_pipe(guidance_scale=1.5, num_inference_steps=2).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def arguments(model, folder, vary=(), **others):
    args = GalleryArguments(output_dir=folder, columns=2, vary=list(vary), device="cpu", **others)
    return args, SamplingArguments(model=model)


def write(*args, **others):
    made = Gallery(*arguments(*args, **others))
    made.write()
    return made


class Tags(HTMLParser):
    """Collects the tags of a page, and checks that they close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_every_class_and_every_value_has_a_row(model, tmp_path):
    write(model, tmp_path / "out", VARY)
    text = (tmp_path / "out" / "index.html").read_text()
    page = Tags(text)
    assert len(page.all("table")) == 3
    assert len(page.all("img")) == 2 * (5 + 2 + 1)
    assert [image["alt"] for image in page.all("img")[:4]] == [
        "ant, sample 0",
        "ant, sample 1",
        "bee, honey bee, sample 0",
        "bee, honey bee, sample 1",
    ]
    assert "2 steps, 4 network evaluations, guidance 1.5, seed 0" in text
    assert re.findall(r"<small>(\d+) evaluations</small>", text) == ["2", "4", "6"]
    record = json.loads((tmp_path / "out" / "gallery.json").read_text())
    assert record["kind"] == "gallery"
    assert record["vary"]["guidance_scale"]["3"]["guidance_scale"] == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "contact_sheet.png",
        "gallery.json",
        "index.html",
    ]


def test_the_page_needs_no_other_file(model, tmp_path):
    write(model, tmp_path / "out")
    page = Tags((tmp_path / "out" / "index.html").read_text())
    assert page.all("script") == page.all("link") == []
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all("pixelated" in image["style"] and image["width"] == "96" for image in page.all("img"))


def test_a_column_starts_from_the_same_noise_in_every_row(model, tmp_path, monkeypatch):
    sections = []
    monkeypatch.setattr(gallery, "render", lambda title, lines, found: sections.extend(found) or "")
    write(model, tmp_path / "out", ["guidance_scale=1.5,3"])
    classes, varied = sections
    pipe = open_pipeline(model)
    for row, label in zip(classes.rows, range(5), strict=True):
        expected = [picture for _, picture in generate(pipe, [label] * 2, seed=0, progress=False)]
        assert all(np.array_equal(a, b) for a, b in zip(row.pictures, expected, strict=True))
    same, other = varied.rows
    assert np.array_equal(same.pictures[1], classes.rows[1].pictures[1])  # up to the rounding of another batch
    assert not np.array_equal(other.pictures[1], classes.rows[1].pictures[1])


def test_a_killed_command_goes_on_where_it_was(model, tmp_path, monkeypatch):
    made = []

    def some(pipe, labels, **options):
        made.append(labels)
        if len(made) == 3:
            raise KeyboardInterrupt
        return generate(pipe, labels, **options)

    monkeypatch.setattr(gallery, "generate", some)
    with pytest.raises(KeyboardInterrupt):
        write(model, tmp_path / "out")
    write(model, tmp_path / "out")
    assert made == [[0, 0], [1, 1], [2, 2], [2, 2], [3, 3], [4, 4]]
    write(model, tmp_path / "out")  # is there already
    assert len(made) == 6


def test_a_folder_of_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"output_dir .* is not an empty folder"):
        write(model, tmp_path)
    write(model, tmp_path / "out", classes=["ant"])
    with pytest.raises(ValueError, match=r"holds another gallery \(classes\)"):
        write(model, tmp_path / "out", classes=["cat"])
    with pytest.raises(ValueError, match=r"holds another gallery \(vary\)"):
        write(model, tmp_path / "out", VARY, classes=["ant"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vary": ["num_samples=3"]}, "num_samples is no setting"),
        ({"vary": ["class_labels=balanced"]}, "class_labels is no setting of a picture"),
        ({"vary": ["guidance_scale=-1"]}, "guidance_scale must be at least 0"),
        ({"vary": ["guidance=autoguidance"]}, "vary: guidance=autoguidance: .*weaker model"),
        ({"vary": ["model=nowhere"]}, "vary: model=nowhere: "),
        ({"classes": ["yak"]}, "yak"),
        ({"classes": ["ant"] * 2000}, "would have 4000 pictures|at most 4000"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_written(model, tmp_path, options, message):
    if "ant" in options.get("classes", ()):
        options = {**options, "vary": ["guidance_scale=1"]}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_script_says_where_the_page_is(model, tmp_path, capsys):
    main(["--model", model, "--columns", "1", "--classes", "3", "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines() == [
        "class dog: 1 pictures.",
        f"The gallery is {tmp_path / 'out' / 'index.html'}.",
    ]


def test_many_classes_are_evenly_spaced():
    assert spaced(3, 100) == [0, 1, 2]
    assert spaced(1000, 4) == [0, 250, 500, 750]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_rows_are_kept_without_loss(mode):
    shape = (4, 6) if mode == "L" else (4, 6, 3)
    pixels = np.random.default_rng(0).integers(0, 255, (3, *shape), dtype=np.uint8)
    found = cut(in_a_row([Image.fromarray(each) for each in pixels]), 3)
    assert np.array_equal(np.stack([np.asarray(each) for each in found]), pixels)


def test_names_are_text_and_never_markup():
    picture = Image.new("L", (300, 300))
    section = Section("<i>", ['a"b\nc'], [Row("<script>", "&", [picture], ['"><script>'])])
    text = render("</title>", ["<b>"], [section])
    page = Tags(text)
    assert page.all("script") == page.all("b") == page.all("i") == []
    (image,) = page.all("img")
    assert (image["alt"], image["width"]) == ('"><script>', "192")
    assert "style" not in image  # larger pictures are made smaller smoothly
