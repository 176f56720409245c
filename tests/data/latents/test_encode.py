import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from PIL import Image

from sdt_diffusion.data import DataArguments, LatentCache
from sdt_diffusion.data.images import ImageArguments
from sdt_diffusion.data.latents import writer
from sdt_diffusion.data.latents.cache import verify
from sdt_diffusion.data.latents.encode import EncodingArguments, encode_into
from sdt_diffusion.data.latents.rows import open_rows
from sdt_diffusion.data.latents.training_data import open_training_data
from sdt_diffusion.sdt.vae import LatentNormalization, check_vae, encode_pixels, sample_posterior
from sdt_diffusion.utils.reading import checksum
from tests.data.latents.test_rows import write_tar
from tests.data.test_images import table

CLASSES = ClassLabel(names=["ant", "bee", "cat"])


@pytest.fixture
def encode(tiny_vae, tmp_path):
    """Encodes a data set of ten pictures into a folder."""
    table([i % 3 for i in range(10)], label=CLASSES).to_parquet(tmp_path / "x.parquet")

    def run(folder="cache", vae=tiny_vae, dataset="x.parquet", resolution=8, image_mode="RGB", **changes):
        args = EncodingArguments(
            tmp_path / folder, "a-vae", **{"shard_size": 4, "batch_size": 3, "num_threads": 1, **changes}
        )
        images = ImageArguments(dataset=str(tmp_path / dataset), resolution=resolution, image_mode=image_mode)
        rows = open_rows(images, args.streaming, 8)
        encode_into(args.output_dir, rows, vae, args, progress=False)
        return args.output_dir

    return run


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".png")}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("float32", 1e-6)])
def test_cached_posteriors_give_what_encoding_online_gives(encode, tiny_vae, tmp_path, dtype, tolerance):
    cache = LatentCache(encode(dtype=dtype), mirrors=True)
    images = open_rows(ImageArguments(dataset=str(tmp_path / "x.parquet")), False, 8).images
    pixels = torch.stack([image for image, _ in images.__getitems__(range(10))])
    moments = torch.stack([moments for moments, _ in cache.__getitems__(range(10))])
    assert cache.labels.tolist() == images.labels.tolist()
    normalization = LatentNormalization(*(cache.manifest["settings"][key] for key in LatentNormalization._fields))
    assert normalization == (0.5, 0.25)
    for mirror, shown in enumerate((pixels, pixels.flip(-1))):
        noise = torch.randn(10, 4, 4, 4)
        found = sample_posterior(moments[:, mirror], noise, normalization)
        torch.testing.assert_close(found, encode_pixels(tiny_vae, shown, noise), atol=tolerance, rtol=tolerance)
    mirrored_latents = (moments[:, 0, 0].flip(-1) - moments[:, 1, 0]).abs().max()
    assert mirrored_latents > 0.01  # mirrored latents are not those of the mirror: both have to be kept


def test_a_cache_keeps_the_statistics_of_each_channel(encode, tiny_vae, tmp_path):
    tiny_vae.register_to_config(
        latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[0.5, 1.0, 2.0, 4.0], scaling_factor=1.0
    )
    tiny_vae.save_pretrained(tmp_path / "vae")
    folder = encode(vae=tiny_vae, dtype="float32")
    tiny_vae.register_to_config(latents_mean=None, latents_std=None)
    tiny_vae.save_config(tmp_path / "vae")  # the cache's normalization wins
    arguments = DataArguments(dataset=str(folder), random_flip=False)
    data = open_training_data(arguments, str(tmp_path / "vae"), 8, seed=0)
    moments, _ = data.images.__getitems__([0])[0]
    found = sample_posterior(moments[None], None, LatentNormalization.of(data.vae))
    mean, std = torch.arange(4.0)[:, None, None], torch.tensor([0.5, 1, 2, 4])[:, None, None]
    torch.testing.assert_close(found[0], (moments[0] - mean) / std)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["shift_factor"] = [0.0, 1.0]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"settings\.shift_factor must be a number"):
        LatentCache(folder)


def test_the_names_of_a_file_are_recorded(tiny_vae, tmp_path):
    table([0, 1, 2], label=CLASSES).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "names.txt").write_text("ant weaver ant\nbee bumblebee\ncat tabby\n")
    images = ImageArguments(dataset=str(tmp_path / "x.parquet"), class_names=str(tmp_path / "names.txt"))
    args = EncodingArguments(tmp_path / "cache", "a-vae")
    encode_into(args.output_dir, open_rows(images, False, 8), tiny_vae, args, progress=False)
    assert LatentCache(tmp_path / "cache").class_names == ["weaver ant", "bumblebee", "tabby"]


def test_a_deep_compression_autoencoder_gives_means_without_deviation(encode, tiny_dc_vae, tmp_path):
    cache = LatentCache(encode(vae=tiny_dc_vae, dtype="float32"), mirrors=True)
    images = open_rows(ImageArguments(dataset=str(tmp_path / "x.parquet")), False, 8).images
    pixels = torch.stack([image for image, _ in images.__getitems__(range(10))])
    moments = torch.stack([moments for moments, _ in cache.__getitems__(range(10))])
    assert moments.shape == (10, 2, 1, 4, 4, 4)
    for mirror, shown in enumerate((pixels, pixels.flip(-1))):
        with torch.no_grad():
            torch.testing.assert_close(moments[:, mirror, 0], tiny_dc_vae.encode(shown).latent, atol=1e-5, rtol=1e-5)
    settings = cache.manifest["settings"]
    assert (settings["vae_class"], settings["scaling_factor"], settings["shift_factor"]) == ("AutoencoderDC", 0.5, 0)
    check_vae(tiny_dc_vae, cache.folder, cache.manifest)


def test_the_manifest_says_how_it_was_made(encode, tiny_vae):
    folder = encode()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["settings"] | {"vae_config_hash": 0, "vae_weights": 0, "dataset_fingerprint": 0} == {
        **{"dataset": manifest["settings"]["dataset"], "dataset_split": "train", "num_rows": 10},
        "dataset_fingerprint": 0,
        **{"class_names": CLASSES.names, "resolution": 8, "image_mode": "RGB", "crop": "centre, by ADM's rule"},
        **{"vae_class": "AutoencoderKL", "vae_config_hash": 0, "vae_weights": 0, "vae_dtype": "float32"},
        **{"scaling_factor": 0.5, "shift_factor": 0.25, "dtype": "float16", "shard_size": 4, "batch_size": 3},
    }
    assert (manifest["vae_name"], manifest["num_images"], manifest["images_per_class"]) == ("a-vae", 10, [4, 3, 3])
    assert [record["num_images"] for record in manifest["shards"]] == [4, 4, 2]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("manifest.json", "preview.png", "records", "shard-00000.safetensors", "shard-00001.safetensors"),
        "shard-00002.safetensors",
    ]
    assert verify(folder, progress=False) == 3


def test_the_preview_shows_images_above_their_latents_and_those_of_their_mirrors(encode, tiny_dc_vae):
    class Same(torch.nn.Module):
        """A VAE whose latents are the pixels."""

        config, spatial_compression_ratio = tiny_dc_vae.config, 2
        dtype, device = torch.float32, torch.device("cpu")

        def encode(self, pixels):
            return type("", (), {"latent": torch.cat([pixels, pixels[:, :1]], 1)[..., ::2, ::2]})

        def decode(self, latents, return_dict):
            return (latents[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2),)

    grid = np.array(Image.open(encode(vae=Same(), dtype="float32") / "preview.png"))
    tops = [20, 20 + (64 + 4 + 16), 20 + 2 * (64 + 4 + 16)]
    image, decoded, mirrored = (grid[top : top + 64 : 8, 4 : 4 + 64 : 8] for top in tops)  # pixels are 8 by 8
    assert np.array_equal(image[::2, ::2], decoded[::2, ::2])
    assert np.array_equal(image[:, ::-1][::2, ::2], mirrored[::2, ::2])
    assert image.std() > 10


@pytest.mark.parametrize("streaming", [False, True])
def test_only_what_is_missing_is_encoded_and_it_is_the_same(encode, streaming):
    folder = encode(streaming=streaming)
    before, manifest = files(folder), (folder / "manifest.json").read_text()
    (folder / "shard-00001.safetensors").unlink()
    untouched = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    assert encode(streaming=streaming) == folder
    assert files(folder) == before
    assert (folder / "manifest.json").read_text() == manifest
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == untouched


def test_a_shard_that_comes_out_otherwise_replaces_its_record(encode):
    folder = encode()
    for name in ("manifest.json", "records/shard-00001.json"):  # as if another device had rounded otherwise
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(checksum(folder / "shard-00001.safetensors"), "0" * 64))
    with pytest.raises(ValueError, match=r"1 of 3 shards are damaged: shard-00001.safetensors\. Delete them and run"):
        verify(folder, progress=False)
    (folder / "shard-00001.safetensors").unlink()
    encode()
    assert verify(folder, progress=False) == 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("lost", ["manifest.json", "records"])
def test_the_manifest_and_its_records_are_made_of_each_other(encode, monkeypatch, tiny_vae, lost, streaming):
    folder = encode(streaming=streaming)
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    shutil.rmtree(folder / lost) if lost == "records" else (folder / lost).unlink()
    monkeypatch.setattr(tiny_vae, "encode", None)  # nothing is left to be encoded
    encode(streaming=streaming)
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


def test_a_kill_while_a_shard_is_repaired_leaves_it_to_be_repaired(encode, monkeypatch):
    folder = encode()
    (folder / "shard-00001.safetensors").unlink()

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "checksum", killed)
        with pytest.raises(KeyboardInterrupt):
            encode()
    shard = folder / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # of the same size, and not what its first record says
    shard.write_bytes(content)
    encode()
    assert verify(folder, progress=False) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_last_shard_that_a_process_did_not_write_is_missed(encode, monkeypatch, tmp_path, streaming):
    save = writer.CacheWriter.save

    def all_but_the_last(self, shard, *rest):
        if shard < 2:
            save(self, shard, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(writer.CacheWriter, "save", all_but_the_last)
        with pytest.raises(ValueError, match="cache has shards for 8 images, and the data set has 10: run the same"):
            encode(streaming=streaming)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert len(LatentCache(encode(streaming=streaming))) == 10


def test_an_interruption_keeps_the_shards_that_were_done(encode, tiny_vae, monkeypatch):
    whole = encode("whole")
    encode_batch = tiny_vae.encode
    calls = []

    def interrupted(pixels):
        calls.append(len(pixels))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode_batch(pixels)

    monkeypatch.setattr(tiny_vae, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode("broken")
    assert calls == [3, 3, 1, 1, 3, 3]  # each batch and its mirror; the second shard is not done
    folder = whole.with_name("broken")
    assert sorted(path.name for path in folder.rglob("*")) == [
        *("preview.png", "records", "settings.json", "shard-00000.json", "shard-00000.safetensors"),
    ]
    with pytest.raises(ValueError, match="is not a manifest of latents"):
        LatentCache(folder)
    calls.clear()
    monkeypatch.setattr(tiny_vae, "encode", lambda pixels: calls.append(len(pixels)) or encode_batch(pixels))
    encode("broken")
    assert calls == [3, 3, 1, 1, 2, 2]  # the second and the third
    assert files(folder) == files(whole)
    assert (folder / "manifest.json").read_text() == (whole / "manifest.json").read_text()


def test_a_stream_of_numbered_labels_knows_its_classes_at_the_end(encode, tmp_path):
    write_tar(tmp_path / "x.tar", range(9))
    cache = LatentCache(encode(dataset="x.tar", streaming=True))
    assert cache.class_names == ["0", "1", "2"]
    assert cache.labels.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert cache.manifest["num_unreadable"] == 1
    assert cache.manifest["shards"][1]["unreadable"] == [
        f"Cannot read the image of row 5 (0005.png) of {tmp_path / 'x.tar'}: Pillow does not know its format"
    ]


class TestBadInput:
    def test_too_many_unreadable_images(self, encode, tmp_path):
        write_tar(tmp_path / "x.tar", [0, 1, 5])
        with pytest.raises(ValueError, match=r"1 images cannot be decoded, more than max_unreadable 0.*\n.*row 2 \("):
            encode(dataset="x.tar", streaming=True, max_unreadable=0)
        cache = LatentCache(encode(dataset="x.tar", streaming=True, max_unreadable=1))
        assert len(cache) == 2

    def test_no_image_at_all(self, encode, tmp_path):
        write_tar(tmp_path / "x.tar", [5])
        with pytest.raises(ValueError, match=r"No image was encoded into .*cache"):
            encode(dataset="x.tar", streaming=True)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"resolution": 16}, "resolution: 8 there, 16 now"),
            (
                {"batch_size": 2, "dtype": "float32"},
                "batch_size: 3 there, 2 now; dtype: 'float16' there, 'float32' now",
            ),
            ({"dataset": "y.parquet"}, "class_names; dataset: .*x.parquet' there, .*; num_rows: 10 there, 4 now"),
        ],
    )
    @pytest.mark.parametrize("finished", [True, False])
    def test_a_restart_with_other_settings(self, encode, tmp_path, change, message, finished):
        table([0, 1, 2, 3]).to_parquet(tmp_path / "y.parquet")
        folder = encode()
        if not finished:
            (folder / "manifest.json").unlink()
        before = files(folder)
        with pytest.raises(
            ValueError, match=rf"holds latents of other settings \({message}\)\. Delete it, or give another"
        ):
            encode(**change)
        assert files(folder) == before

    def test_a_restart_with_another_vae(self, encode, tiny_vae):
        encode()
        with torch.no_grad():
            next(tiny_vae.parameters()).add_(1)
        tiny_vae.register_to_config(scaling_factor=0.7)
        with pytest.raises(ValueError, match=r"scaling_factor: 0.5 there, 0.7 now; vae_weights: '.*' there"):
            encode()

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_restart_with_images_that_have_changed(self, encode, tmp_path, streaming):
        write_tar(tmp_path / "x.tar", range(9))
        (encode(dataset="x.tar", streaming=streaming) / "shard-00001.safetensors").unlink()
        write_tar(tmp_path / "x.tar", range(2, 30))
        with pytest.raises(ValueError, match=r"of other settings .*dataset_fingerprint: '.*' there, '.*' now"):
            encode(dataset="x.tar", streaming=streaming)

    def test_a_folder_of_something_else(self, encode, tmp_path):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "thesis.tex").write_text("precious")
        with pytest.raises(ValueError, match="cache holds something other than latents: give another output_dir"):
            encode()
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thesis.tex"]

    def test_a_damaged_manifest(self, encode):
        folder = encode()
        manifest = folder / "manifest.json"
        whole = manifest.read_text()
        manifest.write_text(whole[:100])
        with pytest.raises(ValueError, match=r"cache/manifest\.json is damaged: .*\. Delete it and run the command"):
            encode()
        manifest.unlink()
        encode()
        assert manifest.read_text() == whole

    def test_a_damaged_record(self, encode):
        record = encode() / "records" / "shard-00001.json"
        record.write_text("")
        with pytest.raises(ValueError, match=r"shard-00001\.json is damaged: .*; delete it and run the same command"):
            encode()
        record.unlink()
        assert verify(encode(), progress=False) == 3

    def test_a_folder_that_another_process_writes_to(self, encode, tmp_path):
        folder = encode()
        before = files(folder)
        program = (
            f"import fcntl; f = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(f, 2); print('locked'); input()"
        )
        with subprocess.Popen([sys.executable, "-uc", program], stdin=-1, stdout=-1) as other:
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(ValueError, match=f"Another process is writing to {folder}"):
                encode()
            other.stdin.close()
        encode()
        assert files(folder) == before

    def test_a_resolution_that_the_vae_cannot_divide(self, encode, tmp_path):
        with pytest.raises(ValueError, match="resolution 9 is not divisible by the VAE's factor 2"):
            encode(resolution=9)
        assert not (tmp_path / "cache").exists()

    def test_gray_images_for_a_vae_of_colors(self, encode):
        with pytest.raises(ValueError, match=r"The VAE takes 3 channel\(s\), and images of image_mode L have 1"):
            encode(image_mode="L")

    def test_latents_that_are_not_finite(self, encode, tiny_vae, tmp_path):
        with torch.no_grad():
            tiny_vae.quant_conv.bias[:4] = 1e6
        with pytest.raises(
            ValueError, match=r"not finite in float16: give dtype float32, or a more precise vae_dtype"
        ):
            encode()
        assert not list(tmp_path.rglob("shard*"))
        assert len(LatentCache(encode("other", dtype="float32"))) == 10

    @pytest.mark.parametrize("change", ["vae_weights", "vae_config_hash"])
    def test_the_vae_of_another_cache(self, encode, tiny_vae, change):
        folder = encode()
        manifest = json.loads((folder / "manifest.json").read_text())
        tiny_vae.register_to_config(scaling_factor=3.0)  # the cache knows its own normalization
        check_vae(tiny_vae, folder, manifest)
        if change == "vae_weights":
            with torch.no_grad():
                next(tiny_vae.parameters()).add_(1)
        else:
            tiny_vae.register_to_config(layers_per_block=7)
        message = rf"cache are of another VAE \({change}: '.*' there, '.*' now\)\. Its own was a-vae; leave out"
        with pytest.raises(ValueError, match=message):
            check_vae(tiny_vae, folder, manifest)

    def test_settings_that_cannot_be(self, tmp_path):
        with pytest.raises(ValueError, match="shard_size must be at least 1 and at most 1000000, not 0"):
            EncodingArguments(tmp_path, "a-vae", shard_size=0)
        with pytest.raises(ValueError, match="pretrained_vae_model_name_or_path must name the VAE"):
            EncodingArguments(tmp_path)
