import numpy as np
import pytest
from PIL import Image, ImageFont

from sdt_diffusion.plots import grid as grid_module
from sdt_diffusion.plots import image_grid


def test_grid_holds_every_image_enlarged_and_in_order():
    images = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 20, 30)]
    grid = np.array(image_grid(images, ["a", "b", "c"], columns=2))
    assert grid.shape == (2 * (64 + 4 + 16) + 4, 2 * (64 + 4) + 4, 3)
    for value, (top, left) in zip((10, 20, 30), [(20, 4), (20, 72), (104, 4)], strict=True):
        assert (grid[top : top + 64, left : left + 64] == value).all()


def test_labels_are_not_repeated():
    images = [Image.new("RGB", (64, 64), "red")] * 4
    one_line = image_grid(images, ["a", "b", "a", "b"], columns=2)
    assert one_line.height == 2 * (64 + 4) + 16 + 4  # the second row needs no text
    text = np.array(image_grid(images, ["a", "a", "a", "a"], columns=2))[4:20]
    assert (text[:, :70] < 128).any()
    assert (text[:, 72:] == 255).all()


def test_long_labels_are_cut_to_their_image():
    grid = np.array(image_grid([Image.new("RGB", (64, 64))] * 2, ["a" * 50, ""], columns=2))
    assert (grid[4:20, 63:] == 255).all()  # with a space before the next label


def labels_in_rows(labels, columns):
    """The labels that are written, row by row, and "" for images without."""
    rows = [range(start, min(start + columns, len(labels))) for start in range(0, len(labels), columns)]
    shown = grid_module._where_labels_begin(labels, rows)
    return [[labels[i] if i in shown else "" for i in row] for row in rows]


def test_an_image_without_a_label_has_that_to_its_left_or_its_row_those_above():
    assert labels_in_rows("abaabb", 2) == [["a", "b"], ["a", ""], ["b", ""]]
    assert labels_in_rows("aaaaabbbbb", 4) == [["a", "", "", ""], ["", "b", "", ""], ["b", ""]]
    assert labels_in_rows("abcabcab", 3) == [["a", "b", "c"], ["", "", ""], ["", ""]]


def test_labels_of_large_images_are_larger():
    def text_height(side):
        grid = np.array(image_grid([Image.new("RGB", (side, side))], ["A"]))
        return grid.shape[0] - side - 8

    assert (text_height(64), text_height(128), text_height(256)) == (16, 21, 42)


def test_names_of_several_words_are_shortened_to_their_first_together():
    font = ImageFont.load_default(size=32)
    names = ["great white shark, white shark, man-eater", "hen, biddy"]
    assert grid_module._fit(names, font, 256) == ["great white shark", "hen"]
    assert grid_module._fit(names[1:], font, 256) == ["hen, biddy"]


@pytest.mark.parametrize(
    ("num_images", "num_classes", "columns"), [(80, 10, 10), (80, 1, 9), (80, 2, 8), (1, 1, 1), (20, 5, 5), (9, 20, 3)]
)
def test_columns_hold_a_class_each_and_few_classes_make_no_tower(num_images, num_classes, columns):
    labels = [str(i % num_classes) for i in range(num_images)]
    assert grid_module.choose_columns(labels) == columns
    assert grid_module.choose_columns(sorted(labels)) <= 10


def test_a_grid_needs_images_with_labels():
    with pytest.raises(ValueError, match="there are 0 and 0"):
        image_grid([], [])
    with pytest.raises(ValueError, match="there are 1 and 2"):
        image_grid([Image.new("L", (8, 8))], ["a", "b"])
