"""From images to a cache of latents, a trained pipeline and samples, beside training that encodes as it goes."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import ClassLabel
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

from sdt_diffusion.sdt.vae import decode_latents
from tests.data.test_images import table
from tests.scripts.process import load_main

SMALL = [
    *("--model", "SDT-S/2", "--cpu_threads", "1", "--report_to", "none", "--mixed_precision", "no"),
    *("--model_overrides", '{"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}'),
    *("--max_train_steps", "4", "--train_batch_size", "4", "--num_inference_steps", "1", "--random_flip", "True"),
    *("--num_validation_images", "3", "--learning_rate", "1e-3"),
]


@pytest.fixture
def train(tmp_path):
    def train(dataset, output_dir, *arguments):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        output = ["--output_dir", str(tmp_path / output_dir)]
        load_main("train/train_dit.py")([*SMALL, "--dataset", str(tmp_path / dataset), *output, *arguments])
        return tmp_path / output_dir

    return train


def test_training_from_a_cache_is_training_that_encodes_online(tiny_vae, tmp_path, train):
    vae = ["--pretrained_vae_model_name_or_path", str(tmp_path / "vae")]
    tiny_vae.save_pretrained(tmp_path / "vae")
    table([i % 3 for i in range(10)], label=ClassLabel(names=["ant", "bee", "cat"])).to_parquet(tmp_path / "x.parquet")
    load_main("train/encode_latents.py")(
        [
            *("--dataset", str(tmp_path / "x.parquet"), "--output_dir", str(tmp_path / "cache"), *vae),
            *("--resolution", "16", "--shard_size", "4", "--dtype", "float32"),
        ]
    )
    online = train("x.parquet", "online", *vae, "--resolution", "16")
    tiny_vae.register_to_config(scaling_factor=9.0)  # the cache remembers what it was
    tiny_vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "names.txt").write_text("ant weaver ant\nbee bumblebee, bee\ncat tabby\n")
    cached = train("cache", "cached", "--class_names", str(tmp_path / "names.txt"))
    weights = [load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (online, cached)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert_close(weights[1][name], weights[0][name], atol=1e-5, rtol=1e-4, msg=name)
    pipe = DiffusionPipeline.from_pretrained(cached)
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (0.5, 0.25)
    assert pipe(["bumblebee"], num_inference_steps=1).images[0].size == (16, 16)

    with pytest.raises(SystemExit, match="label_accuracy_samples needs the images' pixels"):
        train("cache", "other", "--label_accuracy_samples", "10")


@pytest.mark.parametrize(
    ("kind", "resolution", "shape"), [("tiny_rae", (), (64, 4)), ("tiny_dc_vae", ("--resolution", "16"), (4, 8))]
)
def test_latents_without_a_posterior_are_cached_trained_on_and_decoded(
    kind, resolution, shape, tmp_path, train, request
):
    request.getfixturevalue(kind).save_pretrained(tmp_path / "vae")
    table([i % 3 for i in range(10)], label=ClassLabel(names=["ant", "bee", "cat"])).to_parquet(tmp_path / "x.parquet")
    load_main("train/encode_latents.py")(
        [
            *("--pretrained_vae_model_name_or_path", str(tmp_path / "vae"), *resolution),
            *("--dataset", str(tmp_path / "x.parquet"), "--output_dir", str(tmp_path / "cache")),
        ]
    )
    pipe = DiffusionPipeline.from_pretrained(
        train("cache", "run", "--model", "SDT-S/1", "--time_shift", "0", "--max_train_steps", "1")
    )
    assert (pipe.transformer.config.in_channels, pipe.transformer.config.sample_size) == shape
    assert pipe.scheduler.config.shift == pytest.approx((shape[0] * shape[1] ** 2 / 4096) ** 0.5)
    noise = torch.randn(2, shape[0], shape[1], shape[1])
    latents, images = (pipe([0, 1], latents=noise, output_type=kind).images for kind in ("latent", "pt"))
    assert_close(images, (decode_latents(pipe.vae, latents) / 2 + 0.5).clamp(0, 1))
    assert images.shape == (2, 3, 16, 16)
