import numpy as np
from PIL import Image

from sdt_diffusion.plots import plot_accuracy_curve, plot_loss_curve


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
