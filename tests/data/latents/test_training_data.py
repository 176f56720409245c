import pytest
import torch
from datasets import ClassLabel
from diffusers import AutoencoderKL

from sdt_diffusion.data import DataArguments, ShuffledStream
from sdt_diffusion.data.latents.encode import EncodingArguments, encode_into
from sdt_diffusion.data.latents.rows import open_rows
from sdt_diffusion.data.latents.training_data import open_training_data
from sdt_diffusion.utils.seeding import Draws
from tests.data.test_images import table


def write_folder(folder, vae):
    """Write a VAE, ten pictures, and a cache of their latents."""
    vae.save_pretrained(folder / "vae")
    table([i % 3 for i in range(10)], label=ClassLabel(names=["ant", "bee", "cat"])).to_parquet(folder / "x.parquet")
    args = EncodingArguments(folder / "cache", str(folder / "vae"), dtype="float32", shard_size=4)
    images = DataArguments(dataset=str(folder / "x.parquet"), resolution=16)
    encode_into(args.output_dir, open_rows(images, False, 16), vae, args, progress=False)
    return folder


@pytest.fixture
def folder(tiny_vae, tmp_path):
    """A VAE, ten pictures, and a cache of their latents."""
    return write_folder(tmp_path, tiny_vae)


def open_data(folder, name, vae=None, **changes):
    data = DataArguments(dataset=str(folder / name), **changes)
    return open_training_data(data, vae and str(folder / vae), default_sample_size=32, seed=0)


@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize(
    ("kind", "shape"), [("tiny_vae", (4, 8, 8)), ("tiny_dc_vae", (4, 8, 8)), ("tiny_rae", (64, 4, 4))]
)
def test_a_cache_gives_what_encoding_online_gives(kind, shape, random_flip, tmp_path, request):
    folder = write_folder(tmp_path, request.getfixturevalue(kind))
    online = open_data(folder, "x.parquet", "vae", resolution=16, random_flip=random_flip)
    cached = open_data(folder, "cache", random_flip=random_flip)
    assert online.sample_shape == cached.sample_shape == shape
    assert cached.images.class_names == online.images.class_names
    batches = []
    for data in (online, cached):
        stream = ShuffledStream(data.images, 0, data.augment, start=0, stop=32)
        batch, labels = torch.utils.data.default_collate(stream.__getitems__(range(32)))
        batches.append((data.clean(batch, Draws(0, 0, slice(0, 32), 32)), labels))
    assert torch.equal(batches[0][1], batches[1][1])
    torch.testing.assert_close(batches[1][0], batches[0][0], atol=1e-5, rtol=1e-5)


def test_noise_and_mirrors_change_what_a_cache_gives(folder):
    def clean(step, random_flip):
        data = open_data(folder, "cache", random_flip=random_flip)
        stream = ShuffledStream(data.images, 0, data.augment, start=0, stop=8)
        batch, _ = torch.utils.data.default_collate(stream.__getitems__(range(8)))
        return data.clean(batch, Draws(0, step, slice(0, 8), 8))

    same = (clean(0, True) == clean(0, False)).flatten(1).all(1)
    assert 0 < same.sum() < 8
    assert not torch.equal(clean(0, False), clean(1, False))


def test_the_cache_says_how_to_decode(folder):
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.register_to_config(scaling_factor=7.0, shift_factor=None)
    vae.save_pretrained(folder / "vae")
    data = open_data(folder, "cache")
    assert (data.vae.config.scaling_factor, data.vae.config.shift_factor) == (0.5, 0.25)


def test_latents_are_identified_wherever_their_files_are(folder):
    online = open_data(folder, "x.parquet", "vae", resolution=16)
    cached = open_data(folder, "cache")
    for name in ("vae", "cache"):
        (folder / name).rename(folder / f"moved_{name}")
    assert open_data(folder, "x.parquet", "moved_vae", resolution=16).identity == online.identity
    assert open_data(folder, "moved_cache", "moved_vae").identity == cached.identity
    assert online.relocatable_arguments == ("pretrained_vae_model_name_or_path",)
    assert cached.relocatable_arguments == ("pretrained_vae_model_name_or_path", "dataset")


@pytest.mark.parametrize("change", ["weights", "config", "normalization"])
def test_another_vae_in_the_same_place_is_detected(folder, change):
    before = open_data(folder, "x.parquet", "vae", resolution=16).identity
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    if change == "weights":
        vae.quant_conv.bias.data += 1
    elif change == "config":
        vae.register_to_config(sample_size=77)
    else:
        vae.register_to_config(scaling_factor=7.0)
    vae.save_pretrained(folder / "vae")
    assert open_data(folder, "x.parquet", "vae", resolution=16).identity != before


def test_pixels_are_neither_encoded_nor_identified(folder):
    data = open_data(folder, "x.parquet", resolution=16)
    batch = torch.randn(2, 3, 16, 16)
    assert data.vae is None
    assert (data.identity, data.relocatable_arguments) == ({}, ())
    assert data.sample_shape == (3, 16, 16)
    assert data.clean(batch, None) is batch


def test_the_arguments_stay_and_the_data_carry_complete_ones(folder):
    arguments = DataArguments(dataset=str(folder / "cache"))
    data = open_training_data(arguments, None, default_sample_size=32, seed=0)
    assert arguments == DataArguments(dataset=str(folder / "cache"))
    assert data.arguments == DataArguments(dataset=str(folder / "cache"), resolution=16, image_mode="RGB")
    assert open_data(folder, "x.parquet").arguments.resolution == 32


def test_classes_of_a_cache_get_the_names_of_a_file(folder):
    (folder / "names.txt").write_text("ant weaver ant\nbee bumblebee\ncat tabby\n")
    data = open_data(folder, "cache", class_names=str(folder / "names.txt"))
    assert data.images.class_names == ["weaver ant", "bumblebee", "tabby"]
    assert data.identity == open_data(folder, "cache").identity


def test_images_are_of_the_only_size_that_a_vae_takes(tiny_rae, tmp_path):
    write_folder(tmp_path, tiny_rae)
    data = open_data(tmp_path, "x.parquet", "vae")
    assert data.arguments.resolution == 16
    assert data.identity["scaling_factor"] == 1


class TestBadInput:
    def test_a_cache_whose_vae_normalizes_by_itself_with_the_scale_of_another(self, tiny_rae, tmp_path):
        manifest = write_folder(tmp_path, tiny_rae) / "cache" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"scaling_factor": 1.0', '"scaling_factor": 0.18215'))
        with pytest.raises(ValueError, match=r"An AutoencoderRAE normalizes its .* the scaling_factor 0\.18215 and"):
            open_data(tmp_path, "cache")

    @pytest.mark.parametrize("dataset", ["x.parquet", "cache"])
    def test_a_vae_that_would_scale_normalized_latents_again(self, tiny_rae, tmp_path, dataset):
        write_folder(tmp_path, tiny_rae)
        tiny_rae.register_to_config(scaling_factor=0.18215)
        tiny_rae.save_config(tmp_path / "vae")
        with pytest.raises(ValueError, match=r"latents_std, and scaling_factor 0\.18215|vae_config_hash"):
            open_data(tmp_path, dataset, "vae")

    def test_a_vae_that_is_not_the_caches(self, folder):
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        with torch.no_grad():
            next(vae.parameters()).add_(1)
        vae.save_pretrained(folder / "other")
        with pytest.raises(ValueError, match=r"of another VAE \(vae_weights: .*\)\. Its own was .*vae; leave out"):
            open_data(folder, "cache", "other")

    @pytest.mark.parametrize("change", [{"resolution": 32}, {"image_mode": "L"}])
    def test_arguments_that_are_not_the_caches(self, folder, change):
        ((key, value),) = change.items()
        with pytest.raises(ValueError, match=rf"{key} is {value}, but .*cache was encoded with"):
            open_data(folder, "cache", **change)

    def test_a_cache_that_is_not_finished(self, folder):
        (folder / "cache" / "manifest.json").unlink()
        with pytest.raises(ValueError, match=r"is not a manifest of latents: train/encode_latents.py writes one"):
            open_data(folder, "cache")

    def test_a_resolution_that_the_vae_cannot_divide(self, folder):
        with pytest.raises(ValueError, match="resolution 9 is not divisible by the VAE's factor 2"):
            open_data(folder, "x.parquet", "vae", resolution=9)
