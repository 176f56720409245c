import numpy as np
import pytest
from PIL import Image

from sdt_diffusion.evaluation.decay_maps import DecayRow, DecaySection, plot_decays

INCH = 150  # pixels


def row(heads, grid_size=(4, 4), kind="decay", picture="L"):
    picture = Image.new(picture, (8, 8)) if picture else None
    return DecayRow(
        kind, "a label", picture, (1, 2), np.ones((heads, *grid_size)), [f"head {i}" for i in range(heads)]
    )


@pytest.mark.parametrize(("heads", "inches"), [(4, 6.8), (8, 11.6), (16, 11.6)])
def test_any_number_of_heads_fits_a_page(tmp_path, heads, inches):
    plot_decays([DecaySection("block", [row(heads)])], "title", "caption", tmp_path / "decay.png")
    picture = Image.open(tmp_path / "decay.png")
    assert picture.width == pytest.approx(inches * INCH, abs=0.1 * INCH)
    assert np.array(picture.convert("RGB")).std() > 1


def test_blocks_of_several_grids_and_kinds_share_a_picture(tmp_path):
    sections = [
        DecaySection("block 0", [row(2, (2, 6)), row(2, (2, 6), "attention", None)]),
        DecaySection("block 1", [row(9, (30, 40), picture="RGB")]),
    ]
    plot_decays(sections, "title", "caption", tmp_path / "decay.png")
    assert Image.open(tmp_path / "decay.png").height > 3 * INCH
