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
from sdt_diffusion.metrics.extractors import build_extractor
from sdt_diffusion.metrics.extractors.inception import MODES


def weights(mode, request):
    name = "pytorch_fid_weights" if mode == "legacy_pytorch" else "torchscript_weights"
    return request.getfixturevalue(name)


@pytest.fixture(params=MODES)
def peer(request, monkeypatch):
    """clean-fid in one of its modes, made to take the stand-in weights, which it has a fixed place or a URL for."""
    path = weights(request.param, request)
    build = cleanfid.features.InceptionV3W
    monkeypatch.setattr(cleanfid.features, "InceptionV3W", lambda folder, **kwargs: build(path.parent, **kwargs))
    monkeypatch.setattr("cleanfid.inception_pytorch.load_state_dict_from_url", lambda *_, **__: torch.load(path))
    network = build_feature_extractor(request.param, torch.device("cpu"), use_dataparallel=False)
    return request.param, path, network


def test_the_same_images_give_clean_fids_features(peer, folders):
    mode, path, network = peer
    expected = fid.get_folder_features(
        str(folders[0]), network, 0, batch_size=8, device=torch.device("cpu"), mode=mode, verbose=False
    )
    extractor = build_extractor(f"cleanfid_{mode}", str(path))
    extractor.batch_size = 8
    found = summarize(FolderImages(folders[0]), extractor, (), None)
    np.testing.assert_allclose(found.features[:], expected, rtol=1e-5, atol=1e-6 * expected.std())
    assert expected.std(axis=0).mean() > 0.01 * expected.std()  # images differ


def test_the_same_images_give_clean_fids_number(folders, torchscript_weights, monkeypatch):
    """To 1e-5: with 24 images for 2048 dimensions, clean-fid's own value is rounded there."""
    sqrtm = linalg.sqrtm  # clean-fid passes `disp`, which SciPy 1.18 no longer takes
    monkeypatch.setattr(fid.linalg, "sqrtm", lambda matrix, disp=True: (sqrtm(matrix), 0) if not disp else 0)
    extractor = build_extractor("cleanfid_clean", str(torchscript_weights))
    how = {"num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    peer = fid.compute_fid(*map(str, folders), custom_feat_extractor=extractor.network, **how)
    extractor.batch_size = 8
    summaries = [summarize(FolderImages(folder), extractor) for folder in folders]
    ours = frechet_distance(*(summary.statistics["pool"] for summary in summaries))
    assert ours == pytest.approx(peer, rel=1e-5)
    assert ours > 1e-3


def test_the_modes_resize_differently(folders, request):
    image = FolderImages(folders[0])[0]
    prepared = {
        mode: build_extractor(f"cleanfid_{mode}", str(weights(mode, request))).prepare(image) for mode in MODES
    }
    assert prepared["clean"].shape == prepared["legacy_pytorch"].shape == (3, 299, 299)
    assert prepared["legacy_tensorflow"].shape == (3, 32, 32)  # the network resizes
    assert (prepared["clean"] - prepared["legacy_pytorch"]).abs().max() > 1


def test_files_of_other_formats_are_refused(torchscript_weights, torch_fidelity_weights):
    with pytest.raises(ValueError, match="is not the TorchScript Inception"):
        build_extractor("cleanfid_clean", str(torch_fidelity_weights))
    with pytest.raises(ValueError, match="is not a state dict"):
        build_extractor("cleanfid_legacy_pytorch", str(torchscript_weights))
