import json
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from sdt_diffusion.data import LatentCache, RandomFlip, RandomMirror, ShuffledStream
from sdt_diffusion.data.latents import cache as latent_cache
from sdt_diffusion.data.latents.cache import is_latent_cache, verify
from sdt_diffusion.data.latents.writer import write_shard
from tests.data.latents.small_cache import SHAPE, write_cache


def test_images_are_found_over_the_ends_of_shards(tmp_path):
    moments, labels = write_cache(tmp_path, counts=(4, 0, 3, 2))
    cache = LatentCache(tmp_path, mirrors=True)
    assert (len(cache), cache.num_classes, cache.latent_shape) == (9, 3, SHAPE)
    assert cache.class_names == ["ant", "bee", "cat"]
    order = [8, 0, 3, 4, 7, 6, 4]
    found, found_labels = zip(*cache.__getitems__(order), strict=True)
    assert torch.equal(torch.stack(found), moments[order])
    assert list(found_labels) == labels[order].tolist() == cache.labels[order].tolist()


def test_without_mirrors_only_the_image_is_read(tmp_path):
    moments, _ = write_cache(tmp_path)
    cache = LatentCache(tmp_path)
    assert torch.equal(torch.stack([cache[i][0] for i in range(10)]), moments[:, 0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_mirrors_latents_as_it_would_mirror_images(tmp_path, num_workers):
    moments, labels = write_cache(tmp_path)
    stream = ShuffledStream(LatentCache(tmp_path, mirrors=True), 5, RandomMirror(5), start=3, stop=63)
    batches = list(DataLoader(stream, batch_size=7, num_workers=num_workers))
    numbers = ShuffledStream(Numbers(), 5, RandomFlip(5), start=3, stop=63).__getitems__(range(60))
    expected = [(moments[i, int(pixels[0] > pixels[1])], labels[i]) for pixels, i in numbers]
    assert torch.equal(torch.cat([batch for batch, _ in batches]), torch.stack([m for m, _ in expected]))
    assert torch.cat([labels for _, labels in batches]).tolist() == [label for _, label in expected]
    assert 15 < sum(int(pixels[0] > pixels[1]) for pixels, _ in numbers) < 45


class Numbers:
    """As many pictures as the cache holds, brighter to the right."""

    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return [(torch.tensor([0.0, 1.0]), i) for i in indices]


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "MAX_OPEN_FILES", 2)
    moments, _ = write_cache(tmp_path)
    cache = LatentCache(tmp_path, mirrors=True)
    for _ in range(2):
        assert torch.equal(torch.stack([m for m, _ in cache.__getitems__(range(10))]), moments)
    assert len(cache._files) <= 2


def test_a_cache_that_was_read_goes_to_another_process(tmp_path):
    moments, _ = write_cache(tmp_path)
    cache = LatentCache(tmp_path)
    cache[0]
    assert torch.equal(pickle.loads(pickle.dumps(cache))[9][0], moments[9, 0])


def test_a_fingerprint_stays_when_a_cache_is_moved_and_changes_with_what_it_holds(tmp_path):
    made = {"dataset": "/a/images", "batch_size": 4, "resolution": 6}
    caches = {
        "here": made,
        "moved": {**made, "dataset": "/b/images", "batch_size": 8},
        "of larger images": {**made, "resolution": 8},
        "in other shards": {**made, "counts": (4, 3, 3)},
    }
    for name, settings in caches.items():
        write_cache(tmp_path / name, **settings)
    here, moved, *others = [LatentCache(tmp_path / name).fingerprint for name in caches]
    assert moved == here
    assert len({here, *others}) == 3
    assert len(here) == 16


class TestBadInput:
    def test_a_missing_shard(self, tmp_path):
        write_cache(tmp_path)
        (tmp_path / "shard-00001.safetensors").unlink()
        with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing, and should have \d+ bytes: run"):
            LatentCache(tmp_path)
        with pytest.raises(ValueError, match=r"1 of 3 shards are damaged: shard-00001.safetensors\. Delete"):
            verify(tmp_path, progress=False)

    def test_a_truncated_shard(self, tmp_path):
        write_cache(tmp_path)
        path = tmp_path / "shard-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"shard-00002.safetensors is \d+ bytes long, and should have"):
            LatentCache(tmp_path)

    def test_a_shard_that_is_cut_off_while_it_is_read(self, tmp_path):
        write_cache(tmp_path)
        cache = LatentCache(tmp_path)
        path = tmp_path / "shard-00002.safetensors"
        path.write_bytes(path.read_bytes()[:400])
        with pytest.raises(ValueError, match=r"shard-00002.safetensors has become shorter"):
            [cache[i] for i in range(10)]

    @pytest.mark.parametrize("where", [-1, 400])
    def test_a_flipped_bit(self, tmp_path, where):
        write_cache(tmp_path)
        assert verify(tmp_path, progress=False) == 3
        path = tmp_path / "shard-00001.safetensors"
        content = bytearray(path.read_bytes())
        content[where] ^= 4
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"1 of 3 shards are damaged: shard-00001.safetensors"):
            verify(tmp_path, progress=False)

    @pytest.mark.parametrize("where", [0, 9])
    def test_a_header_that_cannot_be_read(self, tmp_path, where):
        write_cache(tmp_path)
        path = tmp_path / "shard-00001.safetensors"
        content = bytearray(path.read_bytes())
        content[where] ^= 255
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged, delete it and encode"):
            LatentCache(tmp_path)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["ant", "bee", "dog"], r"other classes than the manifest \(cat, dog differ\)"),
            (["bee", "ant", "cat"], r"other classes than the manifest \(their order differ\)"),
        ],
    )
    def test_class_names_that_differ_between_shards(self, tmp_path, names, message):
        moments, labels = write_cache(tmp_path)
        write_shard(tmp_path / "shard-00001.safetensors", moments[4:8], labels[4:8], names)
        with pytest.raises(ValueError, match=rf"shard-00001.safetensors has {message}"):
            LatentCache(tmp_path)

    def test_latents_of_another_type(self, tmp_path):
        write_cache(tmp_path, dtype="float32")
        with pytest.raises(
            ValueError, match=r"shard-00000.* holds float16 of shape .*, not float32 of shape \[4, 2, 2"
        ):
            LatentCache(tmp_path)

    def test_latents_of_another_size(self, tmp_path):
        moments, labels = write_cache(tmp_path)
        path = tmp_path / "shard-00001.safetensors"
        write_shard(path, moments[4:8].transpose(2, 3), labels[4:8], ["ant", "bee", "cat"])
        with pytest.raises(
            ValueError, match=r"shard-00001.* of shape \[4, 2, 4, 2, 3, 3\], not .* \[4, 2, 2, 4, 3, 3\]"
        ):
            LatentCache(tmp_path)

    def test_labels_that_are_no_class(self, tmp_path):
        moments, labels = write_cache(tmp_path)
        write_shard(tmp_path / "shard-00001.safetensors", moments[4:8], labels[4:8] + 1, ["ant", "bee", "cat"])
        with pytest.raises(ValueError, match=r"shard-00001.safetensors has labels outside 0..2"):
            LatentCache(tmp_path)

    def test_a_manifest_of_another_version(self, tmp_path):
        write_cache(tmp_path)
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2, "shards": "elsewhere"}))
        assert is_latent_cache(tmp_path)
        with pytest.raises(ValueError, match=r"manifest.json is of version 2, and this release reads version 1"):
            LatentCache(tmp_path)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda m: m.pop("format"), "format is missing"),
            (lambda m: m.update(format="samples"), "format is 'samples', not 'sdt_diffusion latents'"),
            (lambda m: m.pop("version"), "version is missing"),
            (lambda m: m.pop("moments_shape"), "moments_shape is missing"),
            (lambda m: m.update(class_names="ant"), "class_names is 'ant'"),
            (lambda m: m["settings"].pop("dtype"), r"settings\.dtype is missing"),
            (lambda m: m["settings"].update(dtype="int8"), r"settings\.dtype is 'int8', not one of float16, float32"),
            (lambda m: m["settings"].pop("scaling_factor"), r"settings\.scaling_factor is missing"),
            (lambda m: m.update(shards=[]), "shards hold 0 images, and num_images is 10"),
            (lambda m: m.update(shards=[], num_images=0), "shards hold 0 images, and num_images is 0"),
            (lambda m: m["shards"].pop(), "shards hold 8 images, and num_images is 10"),
            (lambda m: m["shards"][1].pop("num_bytes"), r"shards\[1\]\.num_bytes is missing"),
            (lambda m: m["shards"][2].update(num_images="2"), r"shards\[2\]\.num_images is '2'"),
            (lambda m: m["shards"].append(7), r"shards\[3\] is 7"),
            (
                lambda m: m["shards"][0].update(file="../x"),
                r"shards\[0\]\.file is '\.\./x', which is not a name of a shard",
            ),
        ],
    )
    def test_a_damaged_manifest(self, tmp_path, damage, message):
        write_cache(tmp_path)
        path = tmp_path / "manifest.json"
        manifest = json.loads(path.read_text())
        damage(manifest)
        path.write_text(json.dumps(manifest))
        assert is_latent_cache(tmp_path)
        for read in (LatentCache, verify):
            with pytest.raises(ValueError, match=rf"manifest\.json is damaged: {message}\. Delete it and run"):
                read(tmp_path)

    @pytest.mark.parametrize("content", ["", '{"format": "sdt_diffu', "[]", "\udcff"])
    def test_a_manifest_that_is_cut_off(self, tmp_path, content):
        write_cache(tmp_path)
        (tmp_path / "manifest.json").write_text(content, errors="surrogateescape")
        assert is_latent_cache(tmp_path)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged: .*\. Delete it and run"):
            LatentCache(tmp_path)

    @pytest.mark.parametrize("content", [None, "", "{", "[]", '{"num_samples": 3}'])
    def test_a_file_that_is_not_a_manifest(self, tmp_path, content):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        assert not is_latent_cache(tmp_path)
        with pytest.raises(
            ValueError, match=r"manifest.json is not a manifest of latents: train/encode_latents.py writes"
        ):
            LatentCache(tmp_path)
