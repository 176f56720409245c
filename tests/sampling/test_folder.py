import diffusers
import numpy as np
import pytest
import torch

from sdt_diffusion.sampling import folder
from sdt_diffusion.sampling.folder import SampleFolder, sample_into
from sdt_diffusion.sampling.generate import class_labels_for, generate
from sdt_diffusion.utils.fingerprint import fingerprint

LABELS = class_labels_for(11, range(5))
SAMPLING = {"seed": 7, "guidance_scale": 1.5, "num_inference_steps": 2}


def sample(folder, pipe, labels=LABELS, batch_size=4, **changes):
    return sample_into(folder, pipe, labels, {**SAMPLING, **changes}, batch_size, progress=False)


def all_pixels(folder):
    return np.stack([folder[i] for i in range(len(folder))])


def test_samples_are_the_pictures_that_generate_makes(make_pipe, tmp_path):
    pipe = make_pipe()
    found = sample(tmp_path / "samples", pipe)
    images = [np.array(image) for _, image in generate(pipe, LABELS, batch_size=4, progress=False, **SAMPLING)]
    assert np.array_equal(all_pixels(found), np.stack(images))
    assert found.describe()["count"] == 11
    assert found.describe()["sampler"].startswith("FlowMatchEulerDiscreteScheduler, 2 steps, 4 network evaluations")


def test_only_what_is_missing_is_made_and_it_is_the_same(make_pipe, tmp_path):
    pipe = make_pipe()
    folder = tmp_path / "samples"
    before = all_pixels(sample(folder, pipe))
    untouched = (folder / "batch-000000.npy").stat().st_mtime_ns
    (folder / "batch-000001.npy").unlink()
    whole = (folder / "batch-000002.npy").read_bytes()
    (folder / "batch-000002.npy").write_bytes(whole[:-9])
    (folder / ".batch-000001.partial.npy").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"2 of its files are missing or damaged, such as batch-000001.npy; run"):
        SampleFolder(folder)
    assert np.array_equal(all_pixels(sample(folder, pipe)), before)
    assert (folder / "batch-000000.npy").stat().st_mtime_ns == untouched
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed: 7 there, 8 now"),
        ({"batch_size": 3}, "batch_size: 4 there, 3 now"),
        ({"labels": LABELS[:10]}, "class_labels; num_samples: 11 there, 10 now"),
    ],
)
def test_samples_made_with_other_settings_are_not_mixed(make_pipe, tmp_path, change, message):
    pipe = make_pipe()
    sample(tmp_path / "samples", pipe)
    with pytest.raises(ValueError, match=f"holds samples made with other settings .*{message}.*another folder"):
        sample(tmp_path / "samples", pipe, **change)


@pytest.mark.parametrize("sides", [{}, {"height": 12, "width": 16}])
def test_the_disk_is_asked_for_as_much_as_the_pixels_take(make_pipe, tmp_path, monkeypatch, sides):
    asked = []
    monkeypatch.setattr(folder, "require_space", lambda path, size, what: asked.append(size))
    found = sample(tmp_path / "samples", make_pipe(), **sides)
    assert asked == [all_pixels(found).nbytes]


def test_samples_of_another_model_are_not_mixed(make_pipe, tmp_path):
    pipe = make_pipe()
    sample(tmp_path / "samples", pipe)
    with torch.no_grad():
        next(iter(pipe.transformer.parameters())).add_(1)
    with pytest.raises(ValueError, match=r"weights: '.*' there"):
        sample(tmp_path / "samples", pipe)


def test_a_folder_of_something_else_is_left_alone(make_pipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds something other than samples"):
        sample(tmp_path, make_pipe())
    with pytest.raises(ValueError, match=r"holds no samples with a manifest\.json"):
        SampleFolder(tmp_path)


def test_samples_that_are_not_finite_are_refused(make_pipe, make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"Sample 0 \(class 0, seed 7\) is not finite"):
        sample(tmp_path / "samples", make_pipe(transformer=model))


def test_fingerprints_distinguish_values_names_and_types():
    layer = torch.nn.Linear(3, 3)
    first = fingerprint(layer)
    assert fingerprint(layer) == first
    assert fingerprint(torch.nn.Sequential(layer)) != first
    assert fingerprint(layer.to(torch.bfloat16)) != first


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "DDPMScheduler"])
def test_the_same_call_continues_whatever_the_schedulers_config_holds(make_pipe, tmp_path, scheduler):
    pipe = make_pipe(getattr(diffusers, scheduler)())  # DPM-Solver's config holds -inf, for which JSON has no word
    before = all_pixels(sample(tmp_path, pipe))
    (tmp_path / "batch-000001.npy").unlink()
    assert np.array_equal(all_pixels(sample(tmp_path, pipe)), before)
