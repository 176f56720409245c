import os

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sdt_diffusion.classification import SDTHImageProcessor
from sdt_diffusion.evaluation import decay_maps as decay_picture
from sdt_diffusion.evaluation.decay_maps import (
    DecayArguments,
    describe_blocks,
    draw_decays,
    parse_patches,
    record_samples,
)
from sdt_diffusion.sampling.generate import generate
from sdt_diffusion.sdt.vae import decode_latents
from sdt_diffusion.utils.seeding import Stream, torch_generator
from tests.sdt_h.small import small_model


@pytest.fixture
def classifier(tmp_path):
    small_model().save_pretrained(tmp_path / "classifier")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 48}}
    SDTHImageProcessor(**size).save_pretrained(tmp_path / "classifier")
    Image.effect_noise((90, 60), 60).save(tmp_path / "image.png")
    return {"model": str(tmp_path / "classifier"), "image": tmp_path / "image.png"}


@pytest.fixture
def generator(tmp_path, make_pipe, tiny_vae, make_model):
    pipe = make_pipe(transformer=make_model(in_channels=4, decomposed=True), vae=tiny_vae, guidance_scale=1.5)
    pipe.save_pretrained(tmp_path / "pipe")
    return {"model": str(tmp_path / "pipe"), "class_label": "bee", "num_inference_steps": 2}


def test_a_classifiers_decays(tmp_path, classifier):
    draw_decays(DecayArguments(output=tmp_path / "new" / "decay.png", attention=True, **classifier))
    picture = Image.open(tmp_path / "new" / "decay.png")
    assert picture.height > picture.width
    with pytest.raises(ValueError, match="exists already"):
        draw_decays(DecayArguments(output=tmp_path / "new" / "decay.png", **classifier))


def test_a_generators_decays_at_several_timesteps(tmp_path, generator):
    heights = []
    for timesteps in ([500.0], [900.0, 500.0, 20.5]):
        output = tmp_path / f"{len(timesteps)}.png"
        draw_decays(DecayArguments(output=output, timestep=timesteps, patches=["3,0"], **generator))
        heights.append(Image.open(output).height)
    assert heights[1] > 2 * heights[0]


@torch.no_grad()
def test_a_generator_sees_its_sample_and_noise_in_trainings_proportion(tmp_path, generator):
    pipe = DiffusionPipeline.from_pretrained(generator["model"])
    ((_, clean),) = generate(
        pipe, pipe.get_label_ids("bee"), seed=3, output_type="latent", guidance_scale=1.5, num_inference_steps=2
    )
    noise = torch.randn(clean.shape, generator=torch_generator(Stream.NOISED_SAMPLE, 3, 0))
    arguments = DecayArguments(output=tmp_path / "decay.png", timestep=[0.0, 250.0, 1000.0], seed=3, **generator)
    inputs = record_samples(arguments, "cpu").inputs
    for each, expected in zip(inputs, (clean, 0.75 * clean + 0.25 * noise, noise), strict=True):
        pixels = decode_latents(pipe.vae, expected[None])
        assert each.picture == pipe.image_processor.postprocess(pixels)[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Give either image"),
        ({"timestep": [1200.0]}, "timestep must be between 0 and 1000, .* not 1200"),
        ({"timestep": [5.0], "class_label": None}, "Give class_label"),
        ({"timestep": [5.0], "class_label": "99"}, "Class label 99 is out of range"),
        ({"timestep": [5.0], "class_label": "wasp"}, "Unknown class name"),
        ({"timestep": [5.0], "blocks": [7]}, "There is no block 7"),
        ({"timestep": [5.0], "blocks": [1, 0, 1]}, "blocks must name each block once; 1 is repeated"),
        ({"timestep": [5.0], "patches": ["4,0"]}, "the grid of the first block is 4 x 4"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, generator, values, message):
    with pytest.raises(ValueError, match=message):
        draw_decays(DecayArguments(output=tmp_path / "decay.png", **{**generator, **values}))
    assert not (tmp_path / "decay.png").exists()


def test_an_output_that_cannot_be_written_is_refused_before_a_sample_is_made(tmp_path, generator, monkeypatch):
    monkeypatch.setattr(decay_picture, "generate", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"No file can be written there.*file"):
        draw_decays(DecayArguments(output=tmp_path / "file" / "decay.png", timestep=[5.0], **generator))


def test_the_caption_says_which_blocks_are_left_out(tmp_path, make_pipe, make_model, monkeypatch):
    captions = []
    monkeypatch.setattr(decay_picture, "plot_decays", lambda *args: captions.append(args[2]) or args[3].touch())
    make_pipe(transformer=make_model(num_layers=4)).save_pretrained(tmp_path / "pipe")
    arguments = {"model": str(tmp_path / "pipe"), "class_label": "3", "num_inference_steps": 1, "timestep": [5.0]}
    for name, blocks in (("default", []), ("one", [2]), ("all", [0, 1, 2, 3])):
        draw_decays(DecayArguments(output=tmp_path / f"{name}.png", blocks=blocks, **arguments))
    first_lines = [caption.splitlines()[0].partition("; ")[2] for caption in captions]
    assert first_lines == ["blocks 0, 2, 3 of 4 (0 to 3)", "block 2 of 4 (0 to 3)", "all 4 blocks"]
    assert describe_blocks([3, 0], make_model(num_layers=5)) == "blocks 0, 3 of 5 (0 to 4)"


def test_a_missing_image_is_named(tmp_path, classifier):
    with pytest.raises(FileNotFoundError, match=r"image .*no\.png cannot be read"):
        draw_decays(DecayArguments(output=tmp_path / "decay.png", **{**classifier, "image": tmp_path / "no.png"}))


def test_an_image_of_sixteen_bits_is_refused_rather_than_cut(tmp_path, classifier):
    Image.fromarray(np.full((60, 90), 40_000, np.uint16)).save(classifier["image"])
    with pytest.raises(ValueError, match=r"image .*image\.png: mode I;16 has more than 8 bits per channel"):
        draw_decays(DecayArguments(output=tmp_path / "decay.png", **classifier))


@pytest.mark.parametrize("content", [b"", b"no image", bytes(500)])
def test_a_damaged_image_is_one_line(tmp_path, classifier, content):
    classifier["image"].write_bytes(content)
    with pytest.raises((ValueError, OSError), match=r"image .*image\.png") as error:
        draw_decays(DecayArguments(output=tmp_path / "decay.png", **classifier))
    assert "\n" not in str(error.value)


def test_a_pipe_is_no_image(tmp_path, classifier):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        draw_decays(DecayArguments(output=tmp_path / "decay.png", **{**classifier, "image": tmp_path / "pipe.png"}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timestep": [float("nan")]}, "timestep must be a finite number"),
        ({"timestep": [-1.0]}, "timestep must be at least 0"),
        ({"blocks": [-1]}, "blocks must be at least 0"),
        ({"timestep": [5.0], "patches": ["0,0"] * 80}, "The picture would have 240 rows, at most 200"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_a_model_is_loaded(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        draw_decays(DecayArguments(model="nothing", output=tmp_path / "decay.png", **values))


def test_patches():
    assert parse_patches([], (8, 4), 2) == [(4, 2), (2, 1)]
    assert parse_patches(["0,3", "7, 1"], (8, 4), 2) == [(0, 3), (7, 1)]
    for text in ("1", "1,2,3", "-1,0", "a,b"):
        with pytest.raises(ValueError, match=f"patches '{text}': give row and column"):
            parse_patches([text], (8, 4), 2)
