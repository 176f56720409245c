import shutil
from pathlib import Path

import cleanfid.features
import numpy as np
import pytest
import torch
from cleanfid import fid
from cleanfid.features import build_feature_extractor
from scipy import linalg

from sdt_diffusion.data.raw_images import FolderImages
from sdt_diffusion.metrics.comparison import frechet_distance
from sdt_diffusion.metrics.extraction import summarize
from sdt_diffusion.metrics.extractors import build_extractor, inception
from sdt_diffusion.metrics.extractors.inception import MODES
from sdt_diffusion.utils.reading import checksum


def build(mode, path):
    return build_extractor(f"cleanfid_{mode}", str(path), trust_weights=mode != "legacy_pytorch")


def weights(mode, request):
    name = "pytorch_fid_weights" if mode == "legacy_pytorch" else "torchscript_weights"
    return request.getfixturevalue(name)


@pytest.fixture(params=MODES)
def peer(request, monkeypatch):
    """clean-fid in one of its modes, made to take the stand-in weights, which it has a fixed place or a URL for."""
    path = weights(request.param, request)
    inception = cleanfid.features.InceptionV3W
    monkeypatch.setattr(cleanfid.features, "InceptionV3W", lambda folder, **kwargs: inception(path.parent, **kwargs))
    monkeypatch.setattr("cleanfid.inception_pytorch.load_state_dict_from_url", lambda *_, **__: torch.load(path))
    network = build_feature_extractor(request.param, torch.device("cpu"), use_dataparallel=False)
    return request.param, path, network


def test_the_same_images_give_clean_fids_features(peer, folders):
    mode, path, network = peer
    expected = fid.get_folder_features(
        str(folders[0]), network, 0, batch_size=8, device=torch.device("cpu"), mode=mode, verbose=False
    )
    extractor = build(mode, path)
    extractor.batch_size = 8
    found = summarize(FolderImages(folders[0]), extractor, (), None)
    np.testing.assert_allclose(found.features[:], expected, rtol=1e-5, atol=1e-6 * expected.std())
    assert expected.std(axis=0).mean() > 0.01 * expected.std()  # images differ


def test_the_same_images_give_clean_fids_number(folders, torchscript_weights, monkeypatch):
    """To 1e-5: with 24 images for 2048 dimensions, clean-fid's own value is rounded there."""
    sqrtm = linalg.sqrtm  # clean-fid passes `disp`, which SciPy 1.18 no longer takes
    monkeypatch.setattr(fid.linalg, "sqrtm", lambda matrix, disp=True: (sqrtm(matrix), 0) if not disp else 0)
    extractor = build("clean", torchscript_weights)
    how = {"num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    peer = fid.compute_fid(*map(str, folders), custom_feat_extractor=extractor.network, **how)
    extractor.batch_size = 8
    summaries = [summarize(FolderImages(folder), extractor) for folder in folders]
    ours = frechet_distance(*(summary.statistics["pool"] for summary in summaries))
    assert ours == pytest.approx(peer, rel=1e-5)
    assert ours > 1e-3


def test_the_modes_resize_differently(folders, request):
    image = FolderImages(folders[0])[0]
    prepared = {mode: build(mode, weights(mode, request)).prepare(image) for mode in MODES}
    assert prepared["clean"].shape == prepared["legacy_pytorch"].shape == (3, 299, 299)
    assert prepared["legacy_tensorflow"].shape == (3, 32, 32)  # the network resizes
    assert (prepared["clean"] - prepared["legacy_pytorch"]).abs().max() > 1


def test_files_of_other_formats_are_refused(torchscript_weights, torch_fidelity_weights):
    with pytest.raises(ValueError, match="is not the TorchScript Inception"):
        build("clean", torch_fidelity_weights)
    with pytest.raises(ValueError, match="is not a state dict"):
        build_extractor("cleanfid_legacy_pytorch", str(torchscript_weights))


class Malicious(torch.nn.Module):
    """TorchScript that writes a file when it is loaded."""

    @torch.jit.export
    def __getstate__(self) -> str:
        return self.target

    @torch.jit.export
    def __setstate__(self, target: str) -> None:
        self.target = target
        torch.save([1], target)

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_torchscript_of_strangers_runs_only_with_consent(torchscript_weights, tmp_path):
    for mode in ("clean", "legacy_tensorflow"):
        with pytest.raises(ValueError, match=r"is not the published Inception .* set trust_extractor_weights"):
            build_extractor(f"cleanfid_{mode}", str(torchscript_weights))
    torch.jit.script(Malicious(str(tmp_path / "ran"))).save(tmp_path / "evil.pt")
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="is code that would run with your rights"):
        build_extractor("cleanfid_clean", str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="is not the TorchScript Inception"):
        build_extractor("cleanfid_clean", str(tmp_path / "evil.pt"), trust_weights=True)
    assert (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="trust_extractor_weights is for extractor_weights of cleanfid_clean"):
        build_extractor("cleanfid_legacy_pytorch", str(torchscript_weights), trust_weights=True)


def test_the_published_torchscript_needs_no_consent_and_is_read_once(torchscript_weights, monkeypatch):
    monkeypatch.setattr(inception, "TORCHSCRIPT_SHA256", checksum(torchscript_weights))
    reads, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path))
    load = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda source, **how: load(source, **how) if how else pytest.fail("again"))
    build_extractor("cleanfid_clean", str(torchscript_weights))
    assert reads == [torchscript_weights]


def test_another_file_in_the_cache_is_refused(torchscript_weights, monkeypatch):
    (torchscript_weights.parent / "checkpoints").mkdir()
    shutil.copy(torchscript_weights, torchscript_weights.parent / "checkpoints")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(torchscript_weights.parent))
    with pytest.raises(ValueError, match=r"is damaged, or not the file of https://.*: delete it"):
        build_extractor("cleanfid_clean")


def test_weights_that_are_nan_are_refused(torchscript_weights, pytorch_fid_weights, tmp_path):
    script = torch.jit.load(torchscript_weights)
    next(script.parameters()).data.view(-1)[0] = torch.nan
    script.save(tmp_path / "nan.pt")
    state_dict = torch.load(pytorch_fid_weights)
    state_dict["Conv2d_1a_3x3.conv.weight"][3] = torch.inf
    torch.save(state_dict, tmp_path / "nan.pth")
    for mode, name in (("clean", "nan.pt"), ("legacy_pytorch", "nan.pth")):
        with pytest.raises(ValueError, match=rf"{name} cannot be used: .* NaN or infinite"):
            build(mode, tmp_path / name)
