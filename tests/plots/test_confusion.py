import numpy as np
import pytest
from PIL import Image

from sdt_diffusion.plots import plot_confusion
from sdt_diffusion.plots.charts import _grouped


@pytest.mark.parametrize("classes", [2, 10, 30, 1000])
@pytest.mark.parametrize("other", [0, 1])
def test_any_number_of_classes_is_a_picture(tmp_path, classes, other):
    counts = np.concatenate([np.eye(classes, dtype=int), np.full((classes, 1), other)], axis=1)
    counts[1] = 0  # a class without images
    names = ["a name that is far too long for an axis"] * classes
    plot_confusion(counts, names, "title", tmp_path / "confusion.png")
    pixels = np.array(Image.open(tmp_path / "confusion.png").convert("RGB"))
    assert pixels.std() > 1
    assert max(pixels.shape) < 2500


def test_groups_add_up_and_leave_the_other_labels_alone():
    counts = np.arange(5 * 6).reshape(5, 6)
    expected = [
        [counts[:2, :2].sum(), counts[:2, 2:4].sum(), counts[:2, 4].sum(), counts[:2, 5].sum()],
        [counts[2:4, :2].sum(), counts[2:4, 2:4].sum(), counts[2:4, 4].sum(), counts[2:4, 5].sum()],
        [counts[4, :2].sum(), counts[4, 2:4].sum(), counts[4, 4], counts[4, 5]],
    ]
    assert _grouped(counts, 2).tolist() == expected
    assert _grouped(counts, 1).tolist() == counts.tolist()
