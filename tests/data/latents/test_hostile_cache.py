"""Caches and VAEs that others have damaged, linked or prepared."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from safetensors.torch import load_file, save_file

from sdt_diffusion.data import DataArguments, LatentCache
from sdt_diffusion.data.latents import encode as encoding
from sdt_diffusion.data.latents import writer
from sdt_diffusion.data.latents.cache import is_latent_cache, row_checksum, verify
from sdt_diffusion.data.latents.encode import EncodingArguments, encode_into
from sdt_diffusion.data.latents.rows import open_rows
from sdt_diffusion.data.latents.training_data import load_vae, open_training_data
from sdt_diffusion.data.latents.writer import CacheWriter, write_shard
from sdt_diffusion.utils.reading import WEIGHTS_ENDING, write_checksums
from tests.data.latents.small_cache import SHAPE, write_cache
from tests.data.test_images import table

SHARD = "shard-00001.safetensors"


def rewrite(path, **changes):
    """Write a shard again with other tensors of the same size."""
    tensors = load_file(path)
    with path.open("rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    save_file({**tensors, **changes}, path, metadata=metadata)


class TestBits:
    @pytest.mark.parametrize("mirrors", [False, True])
    def test_a_bit_flipped_in_what_is_read_ends_the_run(self, tmp_path, mirrors):
        write_cache(tmp_path, counts=(4, 1, 2))
        path = tmp_path / SHARD
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        unnoticed = 0
        for place in range(start, len(whole)):
            content = bytearray(whole)
            content[place] ^= 1 << place % 8
            path.write_bytes(content)
            try:
                cache = LatentCache(tmp_path, mirrors=mirrors)
                cache.__getitems__(range(7))
                unnoticed += 1
            except ValueError as error:
                assert SHARD in str(error)  # noqa: PT017
        halves = 2 * np.prod(SHAPE) * 2 + 8  # of the mirror, and its checksum
        assert unnoticed == (0 if mirrors else halves)

    def test_the_message_names_the_image_and_what_to_do(self, tmp_path):
        write_cache(tmp_path)
        damaged = load_file(tmp_path / SHARD)["moments"]
        damaged[2] += 1
        rewrite(tmp_path / SHARD, moments=damaged)
        message = rf"{SHARD} is damaged: image 2 is not as it was written\. Delete the file and run the command that"
        with pytest.raises(ValueError, match=message):
            LatentCache(tmp_path).__getitems__(range(10))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_latents_that_are_not_finite_are_refused_though_their_checksum_fits(self, tmp_path, value):
        moments, labels = write_cache(tmp_path)
        moments[6, 0, 1, 2, 0, 0] = value
        write_shard(tmp_path / SHARD, moments[4:8], labels[4:8], ["ant", "bee", "cat"])
        with pytest.raises(ValueError, match=rf"{SHARD} cannot be used: the latents of image 2 are NaN or infinite"):
            LatentCache(tmp_path).__getitems__([1, 6, 2])

    def test_caches_of_earlier_releases_are_read_without_checksums(self, tmp_path):
        moments, _ = write_cache(tmp_path)
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        for record in manifest["shards"]:
            path = tmp_path / record["file"]
            tensors = load_file(path)
            del tensors["checksums"]
            save_file(tensors, path, metadata={"class_names": json.dumps(manifest["class_names"])})
            record["num_bytes"] = path.stat().st_size
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        found = LatentCache(tmp_path, mirrors=True).__getitems__(range(10))
        assert torch.equal(torch.stack([each for each, _ in found]), moments)

    def test_a_checksum_is_of_moments_and_label(self):
        moments = np.arange(8, dtype=np.float16).reshape(2, 1, 2, 2)
        others = [row_checksum(moments, 4), row_checksum(moments[::-1].copy(), 3)]
        assert row_checksum(moments, 3) == row_checksum(moments.copy(), 3)
        assert row_checksum(moments, 3) not in others

    def test_an_error_of_the_disk_names_the_shard(self, tmp_path, monkeypatch):
        write_cache(tmp_path)

        def broken(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(OSError, match=r"Input/output error: '.*shard-00000"):
            LatentCache(tmp_path)[0]

    def test_no_images_are_no_error(self, tmp_path):
        write_cache(tmp_path)
        assert LatentCache(tmp_path).__getitems__([]) == []


class TestShards:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"labels": torch.zeros(4, dtype=torch.float64)}, "holds labels of type float64"),
            ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, r"holds labels of type int64 and shape \(2, 2\)"),
            ({"checksums": torch.zeros(2, 4, dtype=torch.int64)}, r"holds checksums .* shape \(2, 4\)"),
            ({"checksums": torch.zeros(4, 2, dtype=torch.float64)}, "holds checksums of type float64"),
            ({"moments": torch.zeros(4, 2, 2, *SHAPE, dtype=torch.bfloat16)}, "holds None of shape"),
            ({"moments": torch.zeros(4, 2, 2, *SHAPE, dtype=torch.int16)}, "holds None of shape"),
        ],
    )
    def test_tensors_of_another_kind_and_the_same_size(self, tmp_path, monkeypatch, changes, message):
        write_cache(tmp_path)
        rewrite(tmp_path / SHARD, **changes)
        monkeypatch.setattr("sdt_diffusion.data.latents.cache.has_size", lambda *_: True)
        with pytest.raises(ValueError, match=rf"{SHARD} {message}"):
            LatentCache(tmp_path)

    @pytest.mark.parametrize("names", ["3", "{}", '"ant"', "[[1], 2, null]", "[" * 5000])
    def test_names_of_classes_of_another_kind(self, tmp_path, monkeypatch, names):
        write_cache(tmp_path)
        tensors = load_file(tmp_path / SHARD)
        save_file(tensors, tmp_path / SHARD, metadata={"class_names": names})
        monkeypatch.setattr("sdt_diffusion.data.latents.cache.has_size", lambda *_: True)
        with pytest.raises(ValueError, match=rf"{SHARD} (is damaged|has other classes)"):
            LatentCache(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 400, bytes(range(256)) * 5])
    def test_files_of_something_else(self, tmp_path, monkeypatch, content):
        write_cache(tmp_path)
        (tmp_path / SHARD).write_bytes(content)
        monkeypatch.setattr("sdt_diffusion.data.latents.cache.has_size", lambda *_: True)
        with pytest.raises(ValueError, match=rf"{SHARD} is damaged"):
            LatentCache(tmp_path)

    @pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
    def test_what_is_not_a_file(self, tmp_path, kind):
        write_cache(tmp_path)
        path = tmp_path / SHARD
        path.unlink()
        {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "loop": lambda: path.symlink_to(path)}[kind]()
        with pytest.raises(ValueError, match=rf"{SHARD} is missing"):
            LatentCache(tmp_path)
        with pytest.raises(ValueError, match=rf"1 of 3 shards are damaged: {SHARD}"):
            verify(tmp_path, progress=False)


class TestManifest:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda m: m.update(num_images=10**12), "shards hold 10 images, and num_images is 1000000000000"),
            (lambda m: m.update(num_images=1e12), r"num_images is 1000000000000\.0"),
            (lambda m: m.update(num_images=True), "num_images is True"),
            (lambda m: m.update(moments_shape=[2, 2, 4, 3, -3]), r"moments_shape is \[2, 2, 4, 3, -3\]"),
            (lambda m: m.update(moments_shape=[2, 2, 4, 3, 10**12]), "moments_shape is"),
            (lambda m: m.update(moments_shape=[2, 2, 4, 3, 3.0]), "moments_shape is"),
            (lambda m: m.update(moments_shape=[1, 2, 4, 3, 3]), "moments_shape is"),
            (lambda m: m.update(moments_shape=[]), r"moments_shape is \[\]"),
            (lambda m: m.update(class_names=["ant", 3, None]), "class_names holds something other than names"),
            (lambda m: m["shards"][0].update(num_images=-4), r"shards\[0\]\.num_images is -4"),
            (lambda m: m["settings"].update(resolution="6"), r"settings\.resolution must be a whole number, not '6'"),
            (lambda m: m["settings"].update(resolution=0), r"settings\.resolution must be at least 1"),
            (lambda m: m["settings"].update(image_mode=["RGB"]), r"settings\.image_mode must be RGB or L"),
            (lambda m: m["settings"].update(scaling_factor=0), r"settings\.scaling_factor must be more than 0"),
            (lambda m: m["settings"].update(shift_factor=None), r"settings\.shift_factor must be a number"),
        ],
    )
    def test_values_that_cannot_be(self, tmp_path, damage, message):
        write_cache(tmp_path)
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        damage(manifest)
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        for read in (LatentCache, verify):
            with pytest.raises(ValueError, match=rf"manifest\.json is damaged: {message}.*\. Delete it and run"):
                read(tmp_path)

    @pytest.mark.parametrize("content", [b"\0" * 50, b"[" * 100_000, b'{"a": NaN}', b'{"format": 1e999}', b"\xff\xfe"])
    def test_files_of_something_else(self, tmp_path, content):
        write_cache(tmp_path)
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged: .*\. Delete it and run") as caught:
            LatentCache(tmp_path)
        assert str(caught.value).count("is damaged") == 1

    def test_a_link_to_itself_is_no_cache(self, tmp_path):
        (tmp_path / "cache").symlink_to(tmp_path / "cache")
        assert not is_latent_cache(tmp_path / "cache")


class TestRecords:
    @pytest.mark.parametrize(
        "content",
        ['{"file": "shard-00001.safetensors"}', '"text"', '{"file": 3}', "[" * 100_000, "", "null"],
    )
    def test_damaged_ones_are_named(self, tmp_path, content):
        write_cache(tmp_path)
        path = tmp_path / "records" / "shard-00001.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"shard-00001\.json is damaged: .*; delete it and run the same command"):
            CacheWriter(tmp_path, {"num_rows": 10}).finished()

    def test_that_of_another_shard_is_refused_and_other_files_are_passed_over(self, tmp_path):
        write_cache(tmp_path)
        (tmp_path / "records" / "shard-x.json").write_text("")
        assert CacheWriter(tmp_path, {"num_rows": 10}).num_done() == 10
        shutil.copy(tmp_path / "records" / "shard-00000.json", tmp_path / "records" / "shard-00002.json")
        with pytest.raises(ValueError, match=r"shard-00002\.json is damaged: file is shard-00000"):
            CacheWriter(tmp_path, {"num_rows": 10}).finished()

    def test_a_damaged_shard_is_named_when_the_manifest_is_made(self, tmp_path):
        write_cache(tmp_path)
        path = tmp_path / SHARD
        path.write_bytes(b"\xff" * path.stat().st_size)
        with pytest.raises(ValueError, match=rf"{SHARD} is damaged: .* Delete the file and run"):
            CacheWriter(tmp_path, {"num_rows": 10, "class_names": None}).finish(None, SHAPE, 10)


@pytest.fixture
def encode(tiny_vae, tmp_path):
    table([i % 3 for i in range(10)], label=ClassLabel(names=["ant", "bee", "cat"])).to_parquet(tmp_path / "x.parquet")

    def run(folder, **changes):
        args = EncodingArguments(folder, "a-vae", **{"shard_size": 4, "batch_size": 3, "num_threads": 1, **changes})
        rows = open_rows(DataArguments(dataset=str(tmp_path / "x.parquet"), resolution=8), False, 8)
        return encode_into(folder, rows, tiny_vae, args, progress=False)

    return run


class TestEncoding:
    def test_a_disk_without_space_is_noticed_before_the_first_image(self, encode, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2000))
        with pytest.raises(OSError, match=r"The latents will take about 5\.36e-06 GB, and 2e-06 GB are free"):
            encode(tmp_path / "cache")
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_the_estimate_is_about_the_size(self, encode, tmp_path, monkeypatch):
        estimates = []
        monkeypatch.setattr(encoding, "require_space", lambda folder, size, what: estimates.append(size))
        encode(tmp_path / "cache")
        size = sum(path.stat().st_size for path in (tmp_path / "cache").glob(f"*{WEIGHTS_ENDING}"))
        assert 0 < size - estimates[0] < 2000  # the headers
        encode(tmp_path / "cache")
        assert estimates[1] == 0

    def test_more_files_than_a_manifest_can_list(self, encode, tmp_path, monkeypatch):
        monkeypatch.setattr(writer, "MAX_SHARDS", 2)
        with pytest.raises(ValueError, match="shard_size is too small: a cache has at most 2 shards"):
            encode(tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_a_file_as_a_parent(self, encode, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="No file can be written there"):
            encode(tmp_path / "file" / "cache")

    @pytest.mark.parametrize("name", ["manifest.json", "records/settings.json"])
    def test_a_folder_in_place_of_a_file_is_found_before_the_work(self, encode, tmp_path, name):
        (tmp_path / "cache" / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=rf"{name} is not a file"):
            encode(tmp_path / "cache")

    def test_planted_links_lead_nowhere(self, encode, tmp_path):
        encode(tmp_path / "cache")
        (tmp_path / "precious").write_text("precious")
        (tmp_path / "cache" / SHARD).unlink()
        for name in (f"shard-00001.partial{WEIGHTS_ENDING}", "manifest.partial.json", "preview.partial.png"):
            (tmp_path / "cache" / f".{name}").symlink_to(tmp_path / "precious")
        encode(tmp_path / "cache")
        assert verify(tmp_path / "cache", progress=False) == 3
        assert (tmp_path / "precious").read_text() == "precious"

    @pytest.mark.parametrize("name", ["batch_size", "shard_size", "num_threads", "max_unreadable"])
    @pytest.mark.parametrize("value", [-1, 10**10, 1.5, float("nan"), float("inf")])
    def test_numbers(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=f"{name} (must be|is too large)"):
            EncodingArguments(tmp_path, "a-vae", **{name: value})


class TestVae:
    @pytest.fixture
    def folder(self, tiny_vae, tmp_path):
        tiny_vae.save_pretrained(tmp_path / "vae")
        return tmp_path / "vae"

    def weights(self, folder):
        return next(folder.glob("*.safetensors"))

    def test_a_whole_one_is_loaded(self, folder, tiny_vae):
        write_checksums(folder)
        loaded = load_vae(str(folder))
        assert torch.equal(loaded.quant_conv.weight, tiny_vae.quant_conv.weight)
        assert not loaded.training

    def test_one_whose_weights_are_not_complete(self, folder):
        tensors = load_file(self.weights(folder))
        del tensors["quant_conv.weight"]
        save_file(tensors, self.weights(folder), metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"vae are not complete: quant_conv\.weight are missing|Cannot load the VAE"
        ):
            load_vae(str(folder))

    def test_one_whose_weights_are_not_finite(self, folder):
        tensors = load_file(self.weights(folder))
        tensors["quant_conv.weight"].fill_(float("nan"))
        save_file(tensors, self.weights(folder), metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"vae are damaged: quant_conv\.weight are NaN or infinite"):
            load_vae(str(folder))

    def test_one_that_differs_from_its_checksums(self, folder):
        write_checksums(folder)
        content = bytearray(self.weights(folder).read_bytes())
        content[-5] ^= 1
        self.weights(folder).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged: its SHA-256"):
            load_vae(str(folder))

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"_class_name": "UNet2DModel"}', b'{"_class_name": 3}'])
    def test_one_with_a_damaged_config(self, folder, content):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"Cannot load the VAE .*vae: "):
            load_vae(str(folder))

    def test_one_of_another_kind(self, folder):
        (folder / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
        with pytest.raises(ValueError, match=r"the class 'AutoencoderTiny', not one of AutoencoderKL, "):
            load_vae(str(folder))

    @pytest.mark.parametrize("size", [0, 5, 400])
    def test_one_with_weights_that_are_cut(self, folder, size):
        path = self.weights(folder)
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"Cannot load the VAE .*vae: "):
            load_vae(str(folder))

    def test_a_cache_without_one(self, tmp_path):
        write_cache(tmp_path)
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "vae_name": None}))
        with pytest.raises(ValueError, match="names no VAE: give pretrained_vae_model_name_or_path"):
            open_training_data(DataArguments(dataset=str(tmp_path)), None, 8, 0)
