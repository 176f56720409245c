"""Stand-ins for the published Inception weights: random numbers in files of the real formats and names."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn


@torch.no_grad()
def keep_the_signal(network):
    """Random weights whose features are as spread as those of a trained network."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.Linear):
            module.weight.normal_()
    return network


@pytest.fixture(scope="session")
def torch_fidelity_weights(tmp_path_factory):
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Inception(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            """There is none yet."""

    with mock.patch.object(module, "load_state_dict_from_url", return_value=None):
        network = keep_the_signal(Inception("stand-in", ["2048"]))
    path = tmp_path_factory.mktemp("torch-fidelity") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def pytorch_fid_weights(tmp_path_factory):
    from cleanfid import inception_pytorch

    state_dict = {}
    with mock.patch.object(inception_pytorch, "load_state_dict_from_url", return_value=state_dict):
        build = inception_pytorch._inception_v3

        def remember(*args, **kwargs):
            remember.network = build(*args, **kwargs)
            remember.network.load_state_dict = lambda state_dict: None
            return remember.network

        with mock.patch.object(inception_pytorch, "_inception_v3", remember):
            inception_pytorch.fid_inception_v3()
    path = tmp_path_factory.mktemp("pytorch-fid") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(keep_the_signal(remember.network).state_dict(), path)
    return path


class ScriptedInception(nn.Module):
    """The interface of NVIDIA's TorchScript Inception around one layer: 64 x 4 x 8 = 2048 features."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 64, 23, stride=23), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 8)))

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = F.interpolate(x, size=[299, 299], mode="bilinear", align_corners=False)
        return self.layers((x - 128) / 128)


@pytest.fixture(scope="session")
def torchscript_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("clean-fid") / "inception-2015-12-05.pt"
    torch.jit.script(keep_the_signal(ScriptedInception())).save(path)
    return path


def write_images(folder, count, seed, size=32, brightness=0):
    folder.mkdir()
    random = np.random.default_rng(seed)
    for index in range(count):
        blotches = random.normal(128 + brightness, 40, (4, 4, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(blotches).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two folders of images, of other brightness and numbers."""
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "a", 13, 0), write_images(root / "b", 11, 1, brightness=20)
