"""The Inception network of published FIDs, through torch-fidelity."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import numpy as np
import torch

from ...utils.fingerprint import fingerprint
from ...utils.pretrained import brief
from ...utils.reading import check_finite
from .base import FeatureExtractor, Weights, as_rgb, read_weights, state_dict_of

#: SHA-256 of the published files. torch-fidelity's and pytorch-fid's are one file under two names.
STATE_DICT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
TORCHSCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


class TorchFidelityInception(FeatureExtractor):
    """Inception-2015-12-05 with TensorFlow's resizing: pooled and spatial features, and logits without their bias.

    The spatial features are the first 7 channels of the 17 x 17 map that ADM's evaluation calls `mixed_6/conv`,
    flattened with the channels last: 2023 values.

    Args:
        weights: torch-fidelity's state dict, a `.pth` or `.safetensors` file; torch.hub's cache or a download without
            one.
        device: Where to run.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If the file holds something else, or weights that are not finite.
    """

    name = "inception"
    resize = "299x299 bilinear as TensorFlow 1"
    provides = frozenset({"pool", "spatial", "logits"})
    dims = {"pool": 2048, "spatial": 2023, "logits": 1008}  # noqa: RUF012
    is_inception = True

    def __init__(self, weights: str | None = None, device: torch.device | str = "cpu"):
        from torch_fidelity import feature_extractor_inceptionv3 as module

        found = read_weights(weights, module.URL_INCEPTION_V3, STATE_DICT_SHA256)
        # torch-fidelity would run the code in a pickle, and has no argument for tensors.
        with _in_place_of_a_download(module, found, "torch-fidelity's"):
            self.network = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
        check_finite(self.network.state_dict(), str(found.path))
        self.fingerprint = fingerprint(self.network)
        self.network.to(device)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module, inputs, output):
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """Return the RGB values of an image; the network resizes it."""
        return torch.from_numpy(as_rgb(image)).permute(2, 0, 1)

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return pooled and spatial features, and logits."""
        pool, logits = self.network(batch)
        return {"pool": pool, "spatial": self._spatial, "logits": logits}


#: Mode -> how images are resized.
MODES = {
    "clean": "299x299 bicubic of Pillow, antialiased, not rounded",
    "legacy_tensorflow": "299x299 bilinear as TensorFlow 1",
    "legacy_pytorch": "299x299 bilinear of PyTorch, not antialiased",
}


class CleanFIDInception(FeatureExtractor):
    """The pooled features of clean-fid's modes.

    Args:
        mode: A key of `MODES`.
        weights: TorchScript file (`clean`, `legacy_tensorflow`) or pytorch-fid's state dict (`legacy_pytorch`);
            torch.hub's cache or a download without one.
        device: Where to run.
        trust_weights: Execute a TorchScript file that is not the published one. TorchScript is code.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If the file holds something else, weights that are not finite, or code that is not trusted.
    """

    provides = frozenset({"pool"})
    dims = {"pool": 2048}  # noqa: RUF012
    is_inception = True

    def __init__(
        self,
        mode: str,
        weights: str | None = None,
        device: torch.device | str = "cpu",
        trust_weights: bool = False,
    ):
        from cleanfid.resize import build_resizer

        self.name, self.resize = f"cleanfid_{mode}", MODES[mode]
        self._resizer = build_resizer(mode)
        self._unit_range = mode == "legacy_pytorch"
        if mode == "legacy_pytorch":
            self.network = _pytorch_inception(weights)
        else:
            self.network = _torchscript_inception(weights, trust_weights, resize_inside=mode == "legacy_tensorflow")
        self.fingerprint = fingerprint(self.network)
        self.network.to(device)

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """Return the image, resized as clean-fid does."""
        return torch.from_numpy(np.array(self._resizer(as_rgb(image)), dtype=np.float32)).permute(2, 0, 1)

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return pooled features."""
        features = self.network(batch / 255)[0].flatten(1) if self._unit_range else self.network(batch)
        return {"pool": features}


def _torchscript_inception(given: str | None, trust_weights: bool, resize_inside: bool) -> torch.nn.Module:
    from cleanfid.downloads_helper import inception_url
    from cleanfid.inception_torchscript import InceptionV3W

    weights = read_weights(given, inception_url, TORCHSCRIPT_SHA256)
    if not (weights.published or trust_weights):
        raise ValueError(
            f"{weights.path} is not the published Inception (its SHA-256 is another), and TorchScript is code that "
            "would run with your rights: set trust_extractor_weights if you trust whoever made it."
        )
    try:
        script = torch.jit.load(io.BytesIO(weights.content), map_location="cpu")
        with mock.patch("torch.jit.load", return_value=script):  # clean-fid would read the file itself
            network = InceptionV3W("", download=False, resize_inside=resize_inside).eval()
    except Exception as error:
        raise ValueError(f"{weights.path} is not the TorchScript Inception: {brief(error)}") from error
    check_finite(network.state_dict(), str(weights.path))
    return network


def _pytorch_inception(given: str | None) -> torch.nn.Module:
    from cleanfid import inception_pytorch

    weights = read_weights(given, inception_pytorch.FID_WEIGHTS_URL, STATE_DICT_SHA256)
    with _in_place_of_a_download(inception_pytorch, weights, "pytorch-fid's"):
        network = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
    check_finite(network.state_dict(), str(weights.path))
    return network


@contextmanager
def _in_place_of_a_download(module: ModuleType, weights: Weights, whose: str) -> Iterator[None]:
    """Let a library that would download a state dict take that of a file."""
    state_dict = state_dict_of(weights)
    for name, tensor in state_dict.items():
        if not (tensor.is_floating_point() or name.endswith("num_batches_tracked")):
            raise ValueError(f"{weights.path} cannot be used: {name} has type {tensor.dtype}.")
    try:
        with mock.patch.object(module, "load_state_dict_from_url", return_value=state_dict):
            yield
    except RuntimeError as error:
        raise ValueError(f"{weights.path} does not hold {whose} Inception: {brief(error)}") from error
