import random

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from sdt_diffusion import SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.training.ema import WeightAverage, power_profile
from sdt_diffusion.training.reconstruct_ema import (
    drop_snapshots_after,
    list_snapshots,
    main,
    reconstruct,
    save_snapshot,
)
from tests.conftest import TINY


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
    with pytest.raises(ValueError, match=rf"{damaged.name} is damaged: .*[^.]\. Remove it and try again\.$"):
        reconstruct(folder, 0.15, progress=False)


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run of a small model, with snapshots of ten averages."""
    model = SDTTransformer2DModel(**TINY)
    SDTPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "run")
    for step in range(10, 110, 10):
        for sigma_rel in (0.05, 0.1):
            save_snapshot(tmp_path / "run", step, sigma_rel, model.state_dict())
    return tmp_path / "run"


def flags(run, **others):
    values = {"run": run, "sigma_rel": 0.1, "output_dir": run.parent / "out", **others}
    return [f"--{name}={value}" for name, value in values.items()]


def test_the_pipeline_has_the_average(finished):
    main(flags(finished))
    found = load_file(finished.parent / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = load_file(finished / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_flipped_bit_of_a_snapshot_is_noticed_or_harmless(run):
    folder, generator = run[0], random.Random(0)
    *others, _, last = list_snapshots(folder)
    for snapshot in others:
        snapshot.path.unlink()
    expected = reconstruct(folder, 0.1, progress=False).weights
    whole, messages = last.path.read_bytes(), []
    for byte in range(len(whole)):
        content = bytearray(whole)
        content[byte] ^= 1 << generator.randrange(8)
        last.path.write_bytes(content)
        try:
            found = reconstruct(folder, 0.1, progress=False).weights
        except ValueError as error:
            messages.append(str(error))
        else:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(str(last.path) in message for message in messages)
    assert len(messages) > len(whole) * 0.9


def test_a_snapshot_of_an_earlier_version_has_no_digest_and_is_taken(run):
    folder = run[0]
    expected = reconstruct(folder, 0.1, progress=False).weights
    for snapshot in list_snapshots(folder):
        save_file(load_file(snapshot.path), snapshot.path)
    found = reconstruct(folder, 0.1, progress=False).weights
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["step-0000000-0.1.safetensors", "step-0000100-0.5.safetensors"])
def test_a_name_that_no_snapshot_has_is_refused(run, name):
    (run[0] / "ema_snapshots" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} is named as no snapshot is"):
        reconstruct(run[0], 0.1)


def change_to_int8(tensors):
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.int8)


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("proj_out_2.bias"), "does not fit: it lacks proj_out_2.bias"),
        (lambda tensors: tensors.clear(), "does not fit: it lacks .* more"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "does not fit: it has more"),
        (lambda tensors: tensors["proj_out_2.bias"].fill_(torch.nan), "cannot be used: proj_out_2.bias has"),
        (lambda tensors: tensors.update({"proj_out_2.bias": torch.zeros(3)}), r"proj_out_2.bias is .* shape \(3,\)"),
        (change_to_int8, "is torch.int8"),
    ],
)
@pytest.mark.parametrize("count", [1, 20])
def test_tensors_that_are_not_the_models_are_refused(finished, capsys, change, message, digest, count):
    for snapshot in list_snapshots(finished)[-count:]:
        tensors = load_file(snapshot.path)
        change(tensors)
        if digest:
            save_snapshot(finished, snapshot.step, snapshot.sigma_rel, tensors)
        else:
            save_file(tensors, snapshot.path)
    with pytest.raises(SystemExit, match=rf"Error: .*ema_snapshots/step-.* {message}.* Remove it and try again"):
        main(flags(finished))
    assert not (finished.parent / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"[1]", bytes(100), random.Random(0).randbytes(100)])
def test_a_damaged_pipeline_is_refused_in_one_line(finished, name, content):
    (finished / name).write_bytes(content)
    with pytest.raises(SystemExit, match=rf"Error: .*run cannot be loaded: .*{name}") as caught:
        main(flags(finished))
    assert "\n" not in str(caught.value)
    assert not (finished.parent / "out").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e30"])
@pytest.mark.parametrize("name", ["sigma_rel", "step"])
def test_numbers_beyond_their_range_are_refused(finished, capsys, name, value):
    with pytest.raises(SystemExit):
        main(flags(finished, **{name: value}))
    assert name in capsys.readouterr().err
    assert not (finished.parent / "out").exists()


def test_an_output_folder_that_cannot_be_is_refused_first(finished):
    (finished.parent / "file").write_text("")
    with pytest.raises(SystemExit, match=r"Error: .*file"):
        main(flags(finished, output_dir=finished.parent / "file" / "out"))


def test_a_disk_without_space_is_noticed_first(finished, monkeypatch):
    monkeypatch.setattr("sdt_diffusion.training.reconstruct_ema.reconstruct", None)
    monkeypatch.setattr("sdt_diffusion.utils.files.shutil.disk_usage", lambda folder: type("", (), {"free": 1000}))
    with pytest.raises(SystemExit, match=r"The pipeline will take about .* GB"):
        main(flags(finished))
