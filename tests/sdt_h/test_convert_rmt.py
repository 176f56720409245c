import argparse

import pytest
import torch
from safetensors.torch import save_file

from sdt_diffusion.attention import dispatch
from sdt_diffusion.classification import SDTHForImageClassification, load_rmt
from sdt_diffusion.sdt_h import network
from sdt_diffusion.sdt_h.convert_rmt import read_checkpoint, rmt_config
from tests.sdt_h.rmt_reference import RMT, RMTReference, randomize_rmt, smooth_images

EQUAL, NOTICED = 1e-4, 5e-4
SMALL_RMT = ((16, 32, 32), (1, 2, 1), (2, 2, 4), (2, 3, 3), (4, 4, 6), 3, (2,), 7)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """RMT-T with random weights, and its checkpoint."""
    path = tmp_path_factory.mktemp("rmt") / "rmt_t.pth"
    reference = randomize_rmt(RMTReference(*RMT["T"]))
    torch.save({"model": reference.state_dict()}, path)
    return reference, path


@torch.no_grad()
def difference(reference, model, size=(96, 160)):
    """Largest difference between the logits, and that between the logits of two images."""
    pixel_values = smooth_images(2, size, seed=1)
    expected = reference(pixel_values)
    spread = (expected[0] - expected[1]).abs().max().item()
    return (model(pixel_values).logits - expected).abs().max().item(), spread


def test_tiny_gives_rmts_logits(tiny):
    reference, path = tiny
    model = load_rmt(path)
    error, spread = difference(reference, model, (224, 224))
    assert error < EQUAL
    assert spread > 0.5
    assert model.config.num_labels == 1000


@pytest.mark.parametrize("size", ["S", "B"])
def test_larger_ones_give_rmts_logits(size, tmp_path):
    reference = randomize_rmt(RMTReference(*RMT[size]))
    save_file(reference.state_dict(), tmp_path / "rmt.safetensors")
    error, spread = difference(reference, load_rmt(tmp_path / "rmt.safetensors"))
    assert error < EQUAL
    assert spread > 0.5


class TestTheComparisonNotices:
    """What could be wrong without an error: each moves RMT-T's logits by more than five times what passes."""

    def test_no_rotary(self, tiny, monkeypatch):
        def still(head_dim, tokens, device=None):
            return torch.ones(tokens, head_dim), torch.zeros(tokens, head_dim)

        model = load_rmt(tiny[1])
        monkeypatch.setattr(network, "raster_rotary_embedding", still)
        assert difference(tiny[0], model)[0] > NOTICED

    def test_rotary_frequencies_without_the_endpoint(self, tiny, monkeypatch):
        def turned(head_dim, tokens, device=None):
            theta = 10000 ** -(torch.arange(0, head_dim, 2) / head_dim)
            angle = torch.arange(tokens)[:, None] * theta.repeat_interleave(2)
            return angle.cos(), angle.sin()

        model = load_rmt(tiny[1])
        monkeypatch.setattr(network, "raster_rotary_embedding", turned)
        assert difference(tiny[0], model)[0] > NOTICED

    @pytest.mark.parametrize("stage", range(4))
    def test_another_range_of_decays(self, tiny, stage):
        model = load_rmt(tiny[1])
        for block in model.network.stages[stage].blocks:
            gate = block.attn.gate
            gate.exponents = [2 + 2 * (a - 2) for a in gate.exponents]
        assert difference(tiny[0], model)[0] > NOTICED

    def test_height_before_width(self, tiny, monkeypatch):
        model = load_rmt(tiny[1])
        names = ("_rows", "_columns"), ("_from_rows", "_from_columns")
        for a, b in names:
            original = getattr(dispatch, a), getattr(dispatch, b)
            monkeypatch.setattr(dispatch, a, original[1])
            monkeypatch.setattr(dispatch, b, original[0])
        # Square grids: the two passes then differ in nothing but their order.
        assert difference(tiny[0], model, (128, 128))[0] > NOTICED

    @pytest.mark.parametrize("stage", range(4))
    def test_decomposition_of_another_stage(self, tiny, stage):
        decomposed = [i < 2 for i in range(4)]
        decomposed[stage] = not decomposed[stage]
        assert difference(tiny[0], load_rmt(tiny[1], decomposed=decomposed))[0] > NOTICED

    def test_gelu_by_tanh(self, tiny):
        model = load_rmt(tiny[1])
        for stage in model.network.stages:
            for block in stage.blocks:
                block.ff.net[0].approximate = "tanh"
        assert difference(tiny[0], model)[0] > NOTICED

    @pytest.mark.parametrize("part", ["conditional_position", "attn.local_position", "ff.local"])
    def test_no_convolution(self, tiny, part):
        model = load_rmt(tiny[1])
        for stage in model.network.stages:
            for block in stage.blocks:
                torch.nn.init.zeros_(block.get_submodule(part).conv.weight)
        assert difference(tiny[0], model)[0] > NOTICED


def small_rmt(path):
    reference = randomize_rmt(RMTReference(*SMALL_RMT))
    torch.save(reference.state_dict(), path)
    return reference


def test_config_is_read_off_the_tensors(tmp_path):
    reference = small_rmt(tmp_path / "rmt.pth")
    config = rmt_config(reference.state_dict())
    assert config["hidden_sizes"] == [16, 32, 32]
    assert config["depths"] == [1, 2, 1]
    assert config["mlp_ratios"] == [2, 3, 3]
    assert config["decay_heads_ranges"] == [4, 4, 6]
    assert config["layer_scale_init_values"] == [None, None, 1e-6]
    assert config["num_labels"] == 7
    assert difference(reference, load_rmt(tmp_path / "rmt.pth"))[0] < EQUAL


def test_overrides_and_the_start_of_context(tmp_path):
    reference = small_rmt(tmp_path / "rmt.pth")
    names = {i: f"class {i}" for i in range(7)}
    model = load_rmt(tmp_path / "rmt.pth", spatial_decay="context", id2label=names)
    assert difference(reference, model)[0] < EQUAL
    assert model.config.id2label == names
    model.save_pretrained(tmp_path / "model")
    loaded = SDTHForImageClassification.from_pretrained(tmp_path / "model")
    assert difference(reference, loaded)[0] < EQUAL


def test_training_checkpoints_load_and_code_does_not_run(tmp_path):
    reference = RMTReference(*SMALL_RMT)
    checkpoint = {"model": reference.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    torch.save(checkpoint, tmp_path / "training.pth")
    assert read_checkpoint(tmp_path / "training.pth").keys() == reference.state_dict().keys()
    torch.save({"model": reference}, tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match=r"pickled\.pth cannot be read: it holds pickled code, which is not run"):
        read_checkpoint(tmp_path / "pickled.pth")


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_of_training_scripts_load(tmp_path, key, prefix):
    reference = randomize_rmt(RMTReference(*SMALL_RMT))
    state_dict = {f"{prefix}{name}": tensor for name, tensor in reference.state_dict().items()}
    torch.save({key: state_dict, "epoch": 3} if key else state_dict, tmp_path / "rmt.pth")
    assert difference(reference, load_rmt(tmp_path / "rmt.pth"))[0] < EQUAL
    save_file(state_dict, tmp_path / "rmt.safetensors")
    assert difference(reference, load_rmt(tmp_path / "rmt.safetensors"))[0] < EQUAL


def test_a_model_without_head_gives_features_or_gets_a_new_head(tmp_path):
    reference = small_rmt(tmp_path / "rmt.pth")
    state_dict = {name: tensor for name, tensor in reference.state_dict().items() if not name.startswith("head.")}
    torch.save(state_dict, tmp_path / "rmt.pth")
    model = load_rmt(tmp_path / "rmt.pth")
    head, reference.head = reference.head, torch.nn.Identity()
    assert difference(reference, model)[0] < EQUAL
    model.save_pretrained(tmp_path / "model")
    assert difference(reference, SDTHForImageClassification.from_pretrained(tmp_path / "model"))[0] < EQUAL

    model = load_rmt(tmp_path / "rmt.pth", num_labels=4)
    reference.head = model.network.head
    assert difference(reference, model)[0] < EQUAL
    assert model.network.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    reference.head = head
    torch.save({**state_dict, "head.weight": head.weight}, tmp_path / "rmt.pth")
    with pytest.raises(ValueError, match=r"in 1 tensor\(s\), such as head.bias"):
        load_rmt(tmp_path / "rmt.pth")


def test_the_second_head_of_the_token_label_release_is_left_out_with_a_warning(tmp_path):
    reference = small_rmt(tmp_path / "rmt.pth")
    second = {"aux_head.weight": torch.ones(7, 32), "aux_head.bias": torch.ones(7)}
    torch.save({**reference.state_dict(), **second}, tmp_path / "rmt.pth")
    with pytest.warns(UserWarning, match="token-label release: its aux_head is left out"):
        model = load_rmt(tmp_path / "rmt.pth")
    assert difference(reference, model)[0] < EQUAL


@pytest.mark.parametrize("name", ["rmt.pth", "rmt.safetensors"])
@pytest.mark.parametrize("size", [0, 2, 1000])
def test_damaged_files_are_named(tmp_path, name, size):
    path, tensors = tmp_path / name, {"weight": torch.zeros(1000)}
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{path} (cannot be read|is damaged)"):
        load_rmt(path)


def test_other_files_are_refused(tmp_path):
    reference = RMTReference(*SMALL_RMT)
    path = tmp_path / "rmt.pth"
    torch.save({"model": 3}, path)
    with pytest.raises(ValueError, match="holds no state dict, neither at the top nor under 'model' or 'state_dict'"):
        load_rmt(path)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"not a checkpoint of RMT: it has no 'patch_embed.proj.0.weight'"):
        load_rmt(path)
    torch.save({**reference.state_dict(), "layers.0.blocks.0.ffn.ffn_layernorm.weight": torch.ones(32)}, path)
    with pytest.raises(ValueError, match=r"in 1 tensor\(s\), such as .*ffn_layernorm"):
        load_rmt(path)
    torch.save({k: v for k, v in reference.state_dict().items() if k != "norm.bias"}, path)
    with pytest.raises(ValueError, match=r"in 1 tensor\(s\), such as norm.bias"):
        load_rmt(path)
    torch.save({**reference.state_dict(), "norm.bias": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"in 1 tensor\(s\), such as norm.bias"):
        load_rmt(path)
    torch.save({**reference.state_dict(), "layers.1.Relpos.angle": torch.ones(16)}, path)
    with pytest.raises(ValueError, match=r"layers.1.Relpos.angle of the checkpoint is not what the config gives"):
        load_rmt(path)
    torch.save(reference.state_dict(), path)
    with pytest.raises(ValueError, match=r"layers.0.Relpos.decay of the checkpoint is not what the config gives"):
        load_rmt(path, decay_initial_value=3.0)
