import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from sdt_diffusion import SDTGuidance
from sdt_diffusion.sampling import sample
from sdt_diffusion.sampling.generate import (
    class_labels_for,
    describe_sampling,
    generate,
    generate_on_all_processes,
    sample_generator,
    stack_samples,
)
from sdt_diffusion.sdt import GUIDANCE_KINDS
from tests.scripts.process import fork_ranks

LABELS = class_labels_for(10, [0, 2, 4])


def samples(pipe, batch_size, labels=LABELS, **kwargs):
    return stack_samples(
        generate(pipe, labels, 7, batch_size, output_type="np", num_inference_steps=4, progress=False, **kwargs)
    )


@pytest.mark.parametrize("scheduler", [None, DDPMScheduler()], ids=["ode", "noise at every step"])
def test_a_sample_is_the_same_picture_whatever_the_batch_size(make_pipe, scheduler):
    pipe = make_pipe(scheduler)
    reference = samples(pipe, batch_size=10)
    for batch_size in (1, 3):
        np.testing.assert_allclose(samples(pipe, batch_size), reference, atol=1e-4)
    assert np.abs(reference[0] - reference[3]).max() > 0.01  # the same class, another seed


def test_a_sample_does_not_depend_on_which_others_are_drawn(make_pipe):
    pipe = make_pipe()
    some = [8, 1, 5]
    labels = [LABELS[i] for i in some]
    assert [i for i, _ in generate(pipe, labels, 7, indices=some, num_inference_steps=1, progress=False)] == some
    np.testing.assert_allclose(samples(pipe, 2, labels, indices=some), samples(pipe, 10)[some], atol=1e-4)


def test_seeds_differ_by_seed_and_by_index():
    draws = [torch.rand(1, generator=sample_generator(seed, i)).item() for seed in (0, 1, 2**40) for i in range(50)]
    assert len(set(draws)) == len(draws)


def test_a_model_in_training_samples_as_in_evaluation(make_pipe, make_model):
    pipe = make_pipe(transformer=make_model(dropout=0.5, class_dropout_prob=0.9))
    expected = samples(pipe, batch_size=10)
    pipe.transformer.train()
    assert np.array_equal(samples(pipe, batch_size=10), expected)
    assert pipe.transformer.training


def test_labels_take_turns():
    assert LABELS == [0, 2, 4, 0, 2, 4, 0, 2, 4, 0]


def test_the_pipelines_own_progress_bar_comes_back(make_pipe, capsys):
    pipe = make_pipe()
    pipe.set_progress_bar_config(disable=False, desc="mine")
    list(generate(pipe, [0], num_inference_steps=1, progress=False))
    assert "mine" not in capsys.readouterr().err
    pipe([0], num_inference_steps=1)
    assert "mine" in capsys.readouterr().err


def test_description_counts_network_evaluations(make_pipe):
    import diffusers

    sampling = {"num_inference_steps": 10, "guidance_scale": 1.5, "seed": 3}
    text = describe_sampling(make_pipe(), sampling)
    assert text == "FlowMatchEulerDiscreteScheduler, 10 steps, 20 network evaluations, guidance 1.5, seed 3"
    saved = make_pipe(guidance_scale=1.5, num_inference_steps=10)
    assert describe_sampling(saved, {"seed": 3}) == text
    heun = make_pipe(diffusers.HeunDiscreteScheduler())
    assert "19 network evaluations" in describe_sampling(heun, {**sampling, "guidance_scale": 1.0})


def test_several_processes_make_the_pictures_of_one_and_show_a_bar(make_pipe, make_model, tmp_path, capsys):
    """With every guidance; of several batches on each process, and of one that leaves a process without; a script."""
    pipes = {"few": make_pipe()}
    for kind in GUIDANCE_KINDS:
        guider = SDTGuidance.from_kind(kind, guidance_scale=2.5)
        weaker = make_model(num_layers=1) if guider.config.guide_model else None
        pipes[kind] = make_pipe(guider=guider, guide_transformer=weaker)
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
    settings = {"seed": 7, "batch_size": 3, "num_inference_steps": 3}
    labels = {name: LABELS if name in GUIDANCE_KINDS else [0, 1] for name in pipes}
    flags = ["--model", str(tmp_path / "apg"), "--num_images", "9", "--batch_size", "2", "--num_inference_steps", "2"]
    flags += ["--samples_npz", "OUT/samples.npz", "--output_dir", "OUT/samples"]

    def flags_for(name):
        return [flag.replace("OUT", str(tmp_path / name)) for flag in flags]

    (tmp_path / "run.py").write_text(f"""
import numpy as np
from accelerate import PartialState
from sdt_diffusion import SDTPipeline
from sdt_diffusion.sampling import sample
from sdt_diffusion.sampling.generate import generate_on_all_processes

state = PartialState(cpu=True)
for name, labels in {labels}.items():
    pipe = SDTPipeline.from_pretrained({str(tmp_path)!r} + "/" + name)
    images = generate_on_all_processes(pipe, labels, **{settings})
    assert (images is None) == (state.process_index > 0)
    if images is not None:
        np.save({str(tmp_path)!r} + f"/{{name}}.npy", np.stack([np.array(image) for image in images]))
sample.main({flags_for("shared")})
state.destroy_process_group()
""")
    result = fork_ranks(tmp_path / "run.py")
    assert "Sampling: 100%" in result.stderr
    for name, pipe in pipes.items():
        one = generate_on_all_processes(pipe, labels[name], **settings)
        assert "Sampling: 100%" in capsys.readouterr().err
        assert one == [image for _, image in generate(pipe, labels[name], progress=False, **settings)]
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), np.stack([np.array(image) for image in one]))
    assert result.stdout.count("Saved 9 images") == 1
    sample.main(flags_for("alone"))
    shared, alone = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("shared", "alone"))
    assert np.array_equal(shared, alone)
    names = [sorted(path.name for path in (tmp_path / name / "samples").rglob("*")) for name in ("shared", "alone")]
    assert names[0] == names[1]
