"""Test where pictures are on a sheet, and what a click on it means."""

import numpy as np
import pytest
from PIL import Image

from sdt_diffusion.demo.sheet import GAP, MARK, Sheet


def pictures(count, size=(8, 8)):
    return [Image.new("L", size, 20 * index) for index in range(count)]


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (16, 4)])
def test_sheets_are_about_square(count, columns):
    assert Sheet(count, (8, 8), (4, 4)).columns == columns


def test_small_pictures_are_enlarged_pixel_by_pixel_and_large_ones_keep_their_size():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    drawn = np.asarray(Sheet(1, (8, 8), (4, 4), side=80).draw([picture]))
    assert np.array_equal(drawn, np.asarray(picture).repeat(10, axis=0).repeat(10, axis=1))
    assert Sheet(1, (900, 900), (4, 4), side=80).draw([picture]).size == (900, 900)


def test_every_pixel_of_a_picture_means_its_patch():
    sheet = Sheet(5, (8, 12), (2, 3), side=240)
    zoom, (wide, high) = sheet.zoom, (8, 12)
    left, top = wide * zoom + GAP, high * zoom + GAP  # picture 4 is the second in the second row
    for row in range(2):
        for column in range(3):
            for part in (0.05, 0.9):
                x = left + (column + part) * wide * zoom / 3
                y = top + (row + part) * high * zoom / 2
                assert sheet.find(int(x), int(y)) == (4, (row, column))


def test_a_click_beside_all_pictures_means_the_nearest_patch():
    sheet = Sheet(3, (8, 8), (4, 4), side=64)
    width, height = sheet.draw(pictures(3)).size
    assert sheet.find(width - 1, height - 1) == (2, (3, 3))  # the place of a fourth picture
    assert sheet.find(width + 100, 0) == (1, (0, 3))
    assert sheet.find(-5, -5) == (0, (0, 0))


def test_the_mark_is_around_the_patch_that_was_clicked():
    sheet = Sheet(4, (8, 8), (4, 4), side=128)
    drawn = np.asarray(sheet.draw(pictures(4), marked=3, patch=(1, 2)))
    marked = np.argwhere((drawn == [int(MARK[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2))
    assert {sheet.find(x, y) for y, x in marked.tolist()} == {(3, (1, 2))}
