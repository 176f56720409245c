import os
import pickle

import numpy as np
import pytest
import torch
import torch_fidelity
from safetensors.torch import save_file

from sdt_diffusion.data.raw_images import FolderImages
from sdt_diffusion.metrics.extraction import summarize
from sdt_diffusion.metrics.extractors import build_extractor
from sdt_diffusion.metrics.extractors.inception import STATE_DICT_SHA256, TorchFidelityInception
from sdt_diffusion.metrics.registry import METRICS, compute_metrics


@pytest.fixture(scope="module")
def extractor(torch_fidelity_weights):
    extractor = build_extractor("inception", str(torch_fidelity_weights))
    extractor.batch_size = 8  # a network of this size is slow here
    return extractor


def test_the_same_images_give_torch_fidelitys_numbers(extractor, folders, torch_fidelity_weights, tmp_path):
    """FID to 1e-5: with 24 images for 2048 dimensions, torch-fidelity's own value is rounded there; KID to 1e-3, since
    it is computed in float32 there, and small here."""
    peer = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(torch_fidelity_weights),
        **{"fid": True, "isc": True, "kid": True, "prc": True},
        **{"isc_splits": 3, "kid_subsets": 5, "kid_subset_size": 9},
        **{"cuda": False, "cache": False, "verbose": False, "batch_size": 8},
    )
    summaries = [
        summarize(FolderImages(folder), extractor, ("pool", "spatial"), None, 3, tmp_path) for folder in folders
    ]
    values = compute_metrics(list(METRICS), *summaries, kid_subsets=5, kid_subset_size=9)
    assert values["fid"] == pytest.approx(peer["frechet_inception_distance"], rel=1e-5)
    assert values["inception_score"] == pytest.approx(peer["inception_score_mean"], rel=1e-5)
    assert values["inception_score_std"] == pytest.approx(peer["inception_score_std"], rel=1e-3)
    assert values["precision"] == pytest.approx(peer["precision"], abs=1e-6)
    assert values["recall"] == pytest.approx(peer["recall"], abs=1e-6)
    assert values["kid"] == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-3)
    assert values["sfid"] > 0.1
    assert values["inception_score"] > 1.01


def test_spatial_features_are_seven_channels_of_mixed_6(extractor, folders):
    """17 x 17 positions, the channels last, as TensorFlow flattens them."""
    seen = []
    extractor.network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = FolderImages(folders[0])
    batch = torch.stack([extractor.prepare(images[i]) for i in range(2)])
    with torch.no_grad():
        features = extractor(batch)
    assert {kind: values.shape[1] for kind, values in features.items()} == {
        "pool": 2048,
        "spatial": 2023,
        "logits": 1008,
    }
    assert features["spatial"][1, (5 * 17 + 3) * 7 + 6] == seen[0][1, 6, 5, 3]


def test_gray_images_are_the_same_in_three_channels(extractor):
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    assert torch.equal(extractor.prepare(gray), extractor.prepare(np.repeat(gray, 3, axis=2)))


def test_other_weights_have_another_fingerprint(extractor, torch_fidelity_weights, tmp_path):
    state_dict = torch.load(torch_fidelity_weights)
    state_dict["fc.weight"][0, 0] += 1
    torch.save(state_dict, tmp_path / "other.pth")
    other = TorchFidelityInception(str(tmp_path / "other.pth"))
    assert other.fingerprint != extractor.fingerprint
    assert TorchFidelityInception(str(torch_fidelity_weights)).fingerprint == extractor.fingerprint


def test_missing_weights_say_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(url, path, hash_prefix):
        assert hash_prefix == STATE_DICT_SHA256
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(FileNotFoundError) as error:
        TorchFidelityInception()
    assert "weights-inception-2015-12-05-6726825d.pth and put it at" in str(error.value)
    assert str(tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth") in str(error.value)
    with pytest.raises(FileNotFoundError, match="there is no file /nowhere"):
        TorchFidelityInception("/nowhere")


def test_a_file_that_is_not_a_state_dict_is_refused_and_not_run(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not hold torch-fidelity's Inception"):
        TorchFidelityInception(str(path))

    class Evil:
        def __reduce__(self):
            return (path.with_suffix(".ran").touch, ())

    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="is not a state dict"):
        TorchFidelityInception(str(path))
    assert not path.with_suffix(".ran").exists()


def test_tensors_in_safetensors_serve_too(extractor, torch_fidelity_weights, tmp_path):
    save_file(torch.load(torch_fidelity_weights), tmp_path / "weights.safetensors")
    assert TorchFidelityInception(str(tmp_path / "weights.safetensors")).fingerprint == extractor.fingerprint


def test_weights_that_are_not_finite_or_not_floating_point_are_refused(torch_fidelity_weights, tmp_path):
    path = tmp_path / "weights.pth"
    for change, message in (
        (lambda weight: weight.fill_(torch.nan), "fc.weight has values that are NaN or infinite"),
        (lambda weight: weight.to(torch.int8), "fc.weight has type torch.int8"),
    ):
        state_dict = torch.load(torch_fidelity_weights)
        state_dict["fc.weight"] = change(state_dict["fc.weight"])
        torch.save(state_dict, path)
        with pytest.raises(ValueError, match=rf"weights\.pth cannot be used: {message}"):
            TorchFidelityInception(str(path))


@pytest.mark.parametrize(
    "content", [b"", bytes(1000), b"PK\x03\x04" + bytes(100)], ids=["empty", "zeros", "a cut zip"]
)
def test_damaged_weights_are_named(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    for ending, name in (("pth", "inception"), ("pth", "cleanfid_legacy_pytorch")):
        with pytest.raises(ValueError, match=rf"weights\.{ending} is not a state dict"):
            build_extractor(name, str(tmp_path / f"weights.{ending}"))
    with pytest.raises(ValueError, match=r"weights\.pth is not the TorchScript Inception"):
        build_extractor("cleanfid_clean", str(tmp_path / "weights.pth"), trust_weights=True)


def test_a_pipe_is_no_file_of_weights(tmp_path):
    os.mkfifo(tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*weights\.pth"):
        build_extractor("inception", str(tmp_path / "weights.pth"))
