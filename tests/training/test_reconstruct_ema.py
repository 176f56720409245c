import pytest
import torch

from sdt_diffusion.training.ema import WeightAverage, power_profile
from sdt_diffusion.training.reconstruct_ema import (
    drop_snapshots_after,
    list_snapshots,
    reconstruct,
    save_snapshot,
)


@pytest.fixture
def run(tmp_path):
    """A random walk of weights, with snapshots of two averages, and the average of a third width kept along."""
    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.zeros(64), "count": torch.tensor(0)}
    stored = {sigma_rel: WeightAverage(weights, power_profile(sigma_rel)) for sigma_rel in (0.05, 0.1)}
    wanted = WeightAverage(weights, power_profile(0.15))
    for step in range(1, 801):
        weights["weight"] += torch.randn(64, generator=generator)
        weights["count"] += 1
        for average in (*stored.values(), wanted):
            average.update(step)
        if step % 50 == 0:
            for sigma_rel, average in stored.items():
                save_snapshot(tmp_path, step, sigma_rel, average.tensors)
    return tmp_path, wanted.tensors, weights


def test_a_width_that_was_not_kept_comes_out_as_if_it_had_been(run):
    folder, wanted, weights = run
    found = reconstruct(folder, 0.15, progress=False)
    assert len(found.snapshots) == 32
    distance = (found.weights["weight"] - wanted["weight"]).norm()
    assert distance < 0.01 * (weights["weight"] - wanted["weight"]).norm()
    assert found.weights["count"] == 800
    assert found.weights["weight"].dtype == torch.float32


def test_an_earlier_end_uses_nothing_later(run):
    found = reconstruct(run[0], 0.1, step=400, progress=False)
    assert max(snapshot.step for snapshot in found.snapshots) == 400
    assert found.profile_error < 1e-4


def test_snapshots_of_steps_to_be_repeated_are_dropped(run):
    drop_snapshots_after(run[0], 400)
    assert max(snapshot.step for snapshot in list_snapshots(run[0])) == 400
    assert len(list_snapshots(run[0])) == 16


def test_what_cannot_be_combined_is_refused(run, tmp_path):
    folder = run[0]
    with pytest.raises(ValueError, match=r"32 snapshots reproduce the profile of .* 0.01 with an error of \d+%"):
        reconstruct(folder, 0.01)
    with pytest.raises(ValueError, match=r"no snapshot of step 401 .* there are 50, 100"):
        reconstruct(folder, 0.1, step=401)
    with pytest.raises(ValueError, match=r"sigma_rel must be at least 0\.001 and less than 0\.288675"):
        reconstruct(folder, 0.5)
    with pytest.raises(ValueError, match="holds no snapshots: train with ema_profile power"):
        reconstruct(tmp_path / "other", 0.1)
    damaged = list_snapshots(folder)[3].path
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{damaged.name} is damaged"):
        reconstruct(folder, 0.15, progress=False)
