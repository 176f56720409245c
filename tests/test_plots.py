import numpy as np
import pytest
from PIL import Image, ImageFont

from sdt_diffusion import plots
from sdt_diffusion.plots import _grouped, image_grid, plot_accuracy_curve, plot_confusion, plot_loss_curve


def test_loss_curve_is_a_picture(tmp_path):
    records = [{"step": 10 * i, "loss": 1 / i, "learning_rate": 1e-3} for i in range(1, 60)]
    for n in (1, 2, 59):
        plot_loss_curve(records[:n], tmp_path / "curve.png")
        assert np.array(Image.open(tmp_path / "curve.png")).std() > 1


def test_losses_by_timestep_are_shown_where_they_are_known(tmp_path):
    records = [{"step": 10 * i, "loss": 1 / i, "learning_rate": 1e-3} for i in range(1, 30)]
    plot_loss_curve(records, tmp_path / "without.png")
    for record in records[1:]:
        record |= {"loss_by_timestep/0000-0499": 0.9 / record["step"], "loss_by_timestep/0500-0999": 0.5}
    del records[7]["loss_by_timestep/0500-0999"]
    plot_loss_curve(records, tmp_path / "with.png")
    without, shown = (np.array(Image.open(tmp_path / name))[300:600] for name in ("without.png", "with.png"))
    assert (shown != without).any(axis=2).mean() > 0.01


def test_held_out_losses_and_fids_are_shown_where_they_are_known(tmp_path):
    records = [{"step": 10 * i, "loss": 1 + 1 / i, "learning_rate": 1e-3} for i in range(1, 30)]
    plot_loss_curve(records, tmp_path / "without.png")
    held_out = [{"step": 100 * i, "validation_loss": 1.2 + 1 / (3 * i)} for i in range(1, 3)]
    plot_loss_curve(records + held_out, tmp_path / "held_out.png")
    scores = [{"step": 100 * i, "fid": 100.0 / i, "fid_1k": None} for i in range(1, 3)]
    plot_loss_curve(records + held_out + scores, tmp_path / "fid.png")
    plot_loss_curve(held_out, tmp_path / "no_training.png")
    without, held_out, fid = (np.array(Image.open(tmp_path / f"{n}.png")) for n in ("without", "held_out", "fid"))
    assert (held_out != without)[:450].any(axis=2).mean() > 0.001  # one more line in the first panel
    assert fid.shape[0] > held_out.shape[0] == without.shape[0]  # one more panel


def test_accuracy_curve_is_a_picture_whether_or_not_losses_are_there(tmp_path):
    tested = [{"step": 10 * i, "test_accuracy": i / 9, "test_loss": 1 / (i + 1)} for i in range(10)]
    logged = [{"step": 10 * i, "loss": 1 / i, "learning_rate": 1e-3} for i in range(1, 10)]
    for records in (tested[:1], tested[:1] + logged[:1], tested + logged):
        plot_accuracy_curve(records, tmp_path / "curve.png")
        assert np.array(Image.open(tmp_path / "curve.png")).std() > 1
    plot_loss_curve(tested + logged, tmp_path / "loss.png")


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
    shown = plots._where_labels_begin(labels, rows)
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
    assert plots._fit(names, font, 256) == ["great white shark", "hen"]
    assert plots._fit(names[1:], font, 256) == ["hen, biddy"]


@pytest.mark.parametrize(
    ("num_images", "num_classes", "columns"), [(80, 10, 10), (80, 1, 9), (80, 2, 8), (1, 1, 1), (20, 5, 5), (9, 20, 3)]
)
def test_each_column_holds_one_class_and_few_classes_share_rows(num_images, num_classes, columns):
    labels = [str(i % num_classes) for i in range(num_images)]
    assert plots.choose_columns(labels) == columns
    assert plots.choose_columns(sorted(labels)) <= 10


def test_a_grid_needs_images_with_labels():
    with pytest.raises(ValueError, match="there are 0 and 0"):
        image_grid([], [])
    with pytest.raises(ValueError, match="there are 1 and 2"):
        image_grid([Image.new("L", (8, 8))], ["a", "b"])


def test_names_may_hold_anything(tmp_path):
    names = [r"$\frac$", "two\nlines", "no character \udcff", "$"]
    picture = Image.new("RGB", (8, 8))
    assert image_grid([picture] * 4, names).width > 100
    plot_confusion(np.eye(4, 5, dtype=int), names, "a title of $ and $\udcff", tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").width > 100


def test_a_long_and_narrow_image_is_not_enlarged_without_end():
    grid = image_grid([Image.new("RGB", (3000, 1))], ["long"])
    assert grid.size[0] < 4000


def test_records_without_finite_numbers_draw_an_empty_curve(tmp_path):
    nothing = [{"step": 1, "loss": float("nan"), "validation_loss": float("inf"), "learning_rate": 1e-3}]
    plot_loss_curve(nothing, tmp_path / "loss.png")
    plot_accuracy_curve([], tmp_path / "accuracy.png")
    plot_accuracy_curve([{"step": 1, "test_accuracy": float("nan"), "loss": 1.0}], tmp_path / "nan.png")
    assert len(list(tmp_path.iterdir())) == 3
