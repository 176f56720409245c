"""Load what version 0.1.0 saved, and compare what it computes with what it computed then."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import sdt_diffusion.classification  # noqa: F401  (registers the classifiers with transformers)
from sdt_diffusion.data import LatentCache
from sdt_diffusion.sdt.vae import check_vae

SAVED = Path(__file__).parent / "fixtures" / "saved_by_0.1"


@pytest.fixture(scope="module")
def expected():
    return load_file(SAVED / "expected.safetensors")


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_pipeline_draws_the_same_images(expected):
    pipe = DiffusionPipeline.from_pretrained(SAVED / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    sampling = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "pt"}
    assert_close(pipe(["cat", 3], generator=generators, **sampling).images, expected["pipeline"])


def test_a_cache_of_latents_holds_the_same_moments_and_labels(expected):
    cache = LatentCache(SAVED / "cache", mirrors=True)
    moments, labels = zip(*cache.__getitems__(range(len(cache))), strict=True)
    assert torch.equal(torch.stack(moments), expected["cache"])
    assert torch.equal(torch.tensor(labels), expected["cache_labels"])


def test_a_cache_of_latents_refuses_another_vae():
    cache = LatentCache(SAVED / "cache")
    vae = AutoencoderKL.from_pretrained(SAVED / "pipeline" / "vae")
    check_vae(vae, cache.folder, cache.manifest)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(2)
    with pytest.raises(ValueError, match="vae"):
        check_vae(vae, cache.folder, cache.manifest)


@pytest.mark.parametrize(("name", "pixels"), [("classifier", "pixels_32"), ("probe", "pixels_16")])
def test_a_classifier_gives_the_same_logits(expected, name, pixels):
    model = AutoModelForImageClassification.from_pretrained(SAVED / name).eval()
    with torch.no_grad():
        assert_close(model(expected[pixels]).logits, expected[name])
