"""Features of an encoder that are stored beside latents."""

import json

import pytest
import torch
from datasets import ClassLabel
from torch.utils.data import default_collate

from sdt_diffusion.data import DataArguments, LatentCache, ShuffledStream
from sdt_diffusion.data.images import ImageArguments
from sdt_diffusion.data.latents import writer
from sdt_diffusion.data.latents.cache import verify
from sdt_diffusion.data.latents.encode import EncodingArguments, encode_into
from sdt_diffusion.data.latents.rows import open_rows
from sdt_diffusion.data.latents.training_data import open_training_data
from sdt_diffusion.data.patch_features import EncoderArguments, ImagesWithFeatures, PatchEncoder
from tests.data.encoders import save_encoder
from tests.data.test_images import table


@pytest.fixture
def folder(tiny_vae, tmp_path):
    """A VAE, an encoder, and ten pictures."""
    tiny_vae.save_pretrained(tmp_path / "vae")
    save_encoder(tmp_path / "encoder")
    table([i % 3 for i in range(10)], label=ClassLabel(names=["ant", "bee", "cat"])).to_parquet(tmp_path / "x.parquet")
    return tmp_path


@pytest.fixture
def encode(tiny_vae, folder):
    def run(name="cache", encoder="encoder", **changes):
        args = EncodingArguments(
            folder / name, str(folder / "vae"), **{"shard_size": 4, "batch_size": 3, "num_threads": 1, **changes}
        )
        rows = open_rows(ImageArguments(dataset=str(folder / "x.parquet"), resolution=16), False, 16)
        encoder = encoder and PatchEncoder(str(folder / encoder))
        encode_into(args.output_dir, rows, tiny_vae, args, progress=False, encoder=encoder)
        return args.output_dir

    return run


def open_data(folder, name, encoder="encoder", random_flip=False, **options):
    args = EncoderArguments(encoder and str(folder / encoder), **options)
    data = DataArguments(dataset=str(folder / name), random_flip=random_flip)
    vae = None if name == "cache" else str(folder / "vae")
    return open_training_data(data, vae, default_sample_size=8, seed=0, encoder_args=args)


def batch_of(data, num_images=24):
    stream = ShuffledStream(data.images, 0, data.augment, start=0, stop=num_images)
    return default_collate(stream.__getitems__(range(num_images)))[0]


@pytest.mark.parametrize("random_flip", [False, True])
def test_they_are_those_of_the_images_shown(folder, encode, random_flip):
    encode()
    online, cached = (open_data(folder, name, random_flip=random_flip) for name in ("x.parquet", "cache"))
    assert online.feature_shape == cached.feature_shape == (4, 4, 16)
    assert (online.encoder is None, cached.encoder is None) == (False, True)
    batch = batch_of(cached)
    assert isinstance(batch, ImagesWithFeatures)
    assert batch.features.dtype == torch.float16
    torch.testing.assert_close(cached.features(batch).float(), online.features(batch_of(online)), atol=2e-3, rtol=2e-3)
    mirrored = (cached.features(batch) != batch_of(open_data(folder, "cache")).features).flatten(1).any(1)
    assert mirrored.any() == random_flip
    assert not mirrored.all()


def test_latents_and_readers_without_them_see_no_difference(folder, encode):
    plain, both = encode("plain", encoder=None), encode()
    for (moments, label), (pair, other) in zip(LatentCache(plain), LatentCache(both, features=True), strict=True):
        assert torch.equal(moments, pair.images)
        assert label == other
    assert torch.equal(LatentCache(both)[3][0], LatentCache(plain)[3][0])
    assert "alignment" not in (plain / "manifest.json").read_text()
    assert not isinstance(batch_of(open_data(folder, "cache", encoder=None)), ImagesWithFeatures)


def test_an_interrupted_run_encodes_what_is_missing_and_it_is_the_same(encode, monkeypatch):
    shards = {path.name: path.read_bytes() for path in encode("whole").glob("shard-*")}
    save, saved = writer.CacheWriter.save, []

    def interrupted(self, shard, *args):
        if len(saved) == 1:
            raise KeyboardInterrupt
        saved.append(shard)
        save(self, shard, *args)

    monkeypatch.setattr(writer.CacheWriter, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode()
    monkeypatch.setattr(writer.CacheWriter, "save", save)
    again = encode()
    assert {path.name: path.read_bytes() for path in again.glob("shard-*")} == shards
    assert verify(again, progress=False) == 3


def test_held_out_images_are_those_without_flips(folder, encode):
    """They are read with their mirror images, of which none is chosen."""
    encode()
    sides = [open_data(folder, "cache", random_flip=flip) for flip in (False, True)]
    clean = [data.clean(default_collate(data.images.__getitems__([0, 1, 2]))[0], Zeros()) for data in sides]
    assert torch.equal(*clean)


class Zeros:
    def normal(self, shape):
        return torch.zeros(3, *shape)


class TestIdentity:
    def test_a_moved_encoder_is_the_same_and_another_is_refused(self, folder, encode):
        encode()
        save_encoder(folder / "moved")
        save_encoder(folder / "other", "registers")
        assert open_data(folder, "cache", "moved").identity == open_data(folder, "cache").identity
        assert open_data(folder, "cache", None).identity != open_data(folder, "cache").identity
        with pytest.raises(
            ValueError, match=r"cache holds features of .*encoder, and alignment_model .*other is anot"
        ):
            open_data(folder, "cache", "other")
        online = open_data(folder, "x.parquet").identity
        assert open_data(folder, "x.parquet", "moved").identity == online
        assert open_data(folder, "x.parquet", "other").identity != online

    def test_a_folder_is_not_continued_with_another_encoder(self, folder, encode):
        encode()
        save_encoder(folder / "other", "registers")
        for encoder in ("other", None):
            with pytest.raises(ValueError, match=r"holds latents of other settings .alignment_fingerprint: "):
                encode(encoder=encoder)

    @pytest.mark.parametrize("option", [{"alignment_resolution": 20}, {"alignment_layer": 1}])
    def test_options_that_are_not_the_caches(self, folder, encode, option):
        encode()
        with pytest.raises(
            ValueError, match=r"alignment_\w+ is \d+, but the features of .*cache are of .*leave it out"
        ):
            open_data(folder, "cache", **option)


class TestRefusals:
    def test_a_cache_without_features(self, folder, encode):
        encode(encoder=None)
        with pytest.raises(
            ValueError, match=r"alignment_model needs features, and .*cache holds latents without feat"
        ):
            open_data(folder, "cache")

    def test_a_flipped_bit_in_the_features_ends_the_run(self, encode):
        path = encode() / "shard-00000.safetensors"
        content = bytearray(path.read_bytes())
        header = json.loads(content[8 : (start := 8 + int.from_bytes(content[:8], "little"))])
        content[start + header["features"]["data_offsets"][0]] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged: image 0 is not as it was written"):
            LatentCache(path.parent, features=True)[0]
        LatentCache(path.parent)[0]
        with pytest.raises(ValueError, match="1 of 3 shards are damaged"):
            verify(path.parent, progress=False)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"features_shape": [2, 4, 16]},
                r"features_shape is \[2, 4, 16\], and not \[2, height, width, channels\]",
            ),
            ({"features_shape": [1, 4, 4, 16]}, "features_shape is"),
            ({"alignment_model": None}, "alignment_model is None"),
        ],
    )
    def test_a_damaged_manifest(self, encode, change, message):
        path = encode() / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            LatentCache(path.parent, features=True)

    def test_features_that_are_not_finite_in_float16(self, encode, monkeypatch):
        forward = PatchEncoder.forward
        monkeypatch.setattr(PatchEncoder, "forward", lambda self, pixels: forward(self, pixels) * 1e6)
        with pytest.raises(ValueError, match=r"The features of alignment_model .* are not finite in float16"):
            encode()
