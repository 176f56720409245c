import numpy as np
from PIL import Image

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
    assert (grid[4:20, 68:] == 255).all()
