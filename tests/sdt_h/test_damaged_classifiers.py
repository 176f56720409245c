"""Classifiers that were damaged or exchanged, odd checkpoints of RMT, and numbers that nobody means."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

import sdt_diffusion.classification  # noqa: F401 (registers the classifiers)
from sdt_diffusion.sdt_h.convert_rmt import load_rmt
from sdt_diffusion.sdt_h.modeling_sdt_h import SDTHForImageClassification
from sdt_diffusion.sdt_h.network import SDTHNetwork
from sdt_diffusion.utils.pretrained import load_network
from sdt_diffusion.utils.reading import CHECKSUMS_FILE

from .small import SMALL, small_model

WEIGHTS = "model.safetensors"
HEAD = ("network.head.",)


@pytest.fixture
def folder(tmp_path):
    small_model().save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CHECKSUMS_FILE).unlink()


def without(start):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


class TestClassifiers:
    def test_a_whole_one_loads(self, folder):
        loaded = load_network(AutoModelForImageClassification, str(folder), "a classifier")
        assert isinstance(loaded, SDTHForImageClassification)

    @pytest.mark.parametrize("start", ["network.head.", "network.stages.1."])
    def test_weights_that_are_missing_are_refused_by_scripts(self, folder, start):
        change_tensors(folder, without(start))
        with pytest.raises(ValueError, match=f"has no weights that fit for {start}.*: is it trained, and whole"):
            load_network(AutoModelForImageClassification, str(folder), "a classifier")

    def test_a_new_head_can_still_be_started(self, folder):
        change_tensors(folder, without("network.head."))
        assert SDTHForImageClassification.from_pretrained(folder).network.head.weight.std() > 0
        model = load_network(SDTHForImageClassification, str(folder), "a classifier", may_lack=HEAD)
        assert model.network.head.weight.std() > 0
        other = {"num_labels": 7, "ignore_mismatched_sizes": True}
        with pytest.raises(ValueError, match=r"no weights that fit for network\.head\.bias, network\.head\.weight"):
            load_network(SDTHForImageClassification, str(folder), "a classifier", **other)

    def test_nan_is_refused(self, folder):
        change_tensors(
            folder, lambda tensors: {k: v * math.nan if v.is_floating_point() else v for k, v in tensors.items()}
        )
        with pytest.raises(ValueError, match=r"cannot be used: .* NaN or infinite"):
            load_network(AutoModelForImageClassification, str(folder), "a classifier")

    def test_one_flipped_bit_is_noticed(self, folder):
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[-5] ^= 1
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged: its SHA-256 .* on purpose, delete .*checksums\.json"):
            AutoModelForImageClassification.from_pretrained(folder)
        small_model().save_pretrained(folder)
        AutoModelForImageClassification.from_pretrained(folder)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", bytes(1000), b"[" * 100_000, bytes(range(256))])
    @pytest.mark.parametrize("name", ["config.json", WEIGHTS])
    def test_damaged_files_are_named(self, folder, name, content):
        (folder / CHECKSUMS_FILE).unlink()
        (folder / name).write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=r"cannot be loaded as a classifier \(.+\)"):
            load_network(AutoModelForImageClassification, str(folder), "a classifier")

    @pytest.mark.parametrize("changes", [{"depths": [0, 1, 1]}, {"num_channels": math.nan}, {"hidden_sizes": 3}])
    def test_configs_of_nonsense_are_refused(self, folder, changes):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        message = rf"cannot be loaded as a classifier \({next(iter(changes))} must be "
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_network(AutoModelForImageClassification, str(folder), "a classifier")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("depths", value) for value in ((0, 1, 1), (1, 1, 10**9), (1, 1, "two"), 3, ())),
            *(("hidden_sizes", value) for value in ((0, 32, 32), (32, 32, 10**9))),
            *(("num_attention_heads", value) for value in ((0, 2, 4), (1, 2, math.nan))),
            *(("mlp_ratios", value) for value in ((0, 1, 1), (1, 1, math.inf))),
            *(("decay_heads_ranges", value) for value in ((math.nan, 1, 1), (1e30, 1, 1))),
            *(("drop_path_rate", value) for value in (-1, 1, math.nan)),
            *(("stem_strides", value) for value in ((0, 1), (2,), 2)),
            *(("head_hidden_size", 0), ("num_labels", -1), ("num_labels", 10**9), ("num_channels", 0)),
            *(("dropout", 2), ("layer_norm_eps", math.nan), ("initializer_range", -1), ("decay_initial_value", "x")),
        ],
    )
    def test_numbers_that_nobody_means_are_refused(self, name, value):
        with pytest.raises(ValueError, match=name):
            SDTHNetwork(**{**SMALL, name: value})


class TestRmt:
    @pytest.mark.parametrize(
        "checkpoint",
        [
            [1, 2],
            None,
            {3: torch.ones(1)},
            {"model": [torch.ones(1)]},
            {"weight": torch.tensor([math.nan])},
            {"weight": torch.ones(1, dtype=torch.complex64)},
            {"weight": torch.ones(1).expand(10**9)},
            {"weight": torch.ones(2, 2).to_sparse()},
            {"layers.0.blocks.0.final_layer_norm.weight": torch.tensor(1.0)},
        ],
    )
    def test_odd_contents_are_refused(self, tmp_path, checkpoint):
        torch.save(checkpoint, tmp_path / "rmt.pth")
        with pytest.raises(ValueError, match=r"rmt\.pth|not a checkpoint of RMT"):
            load_rmt(tmp_path / "rmt.pth")

    def test_sizes_that_no_memory_holds_are_refused(self, tmp_path):
        many = {
            "patch_embed.proj.0.weight": torch.ones(1, 3),
            "proj.weight": torch.ones(10**9, 0),
            "layers.0.blocks.0.final_layer_norm.weight": torch.ones(8, 1),
            "layers.0.blocks.0.ffn.fc1.weight": torch.ones(8, 1),
            "layers.0.Relpos.decay": torch.tensor([-0.1]),
        }
        torch.save(many, tmp_path / "rmt.pth")
        with pytest.raises(ValueError, match=r"head_hidden_size must be|does not fit|is not what the config gives"):
            load_rmt(tmp_path / "rmt.pth")

    def test_what_is_no_file_is_named(self, tmp_path):
        import os

        os.mkfifo(tmp_path / "pipe.pth")
        for name in ("pipe.pth", "no.pth", ".", "no.safetensors"):
            with pytest.raises(FileNotFoundError, match="There is no file"):
                load_rmt(tmp_path / name)
