"""The Inception network of published FIDs, through torch-fidelity."""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from ...utils.fingerprint import fingerprint
from .base import FeatureExtractor, as_rgb, brief, find_weights, load_state_dict


class TorchFidelityInception(FeatureExtractor):
    """Inception-2015-12-05 with TensorFlow's resizing: pooled and spatial features, and logits without their bias.

    The spatial features are the first 7 channels of the 17 x 17 map that ADM's evaluation calls `mixed_6/conv`,
    flattened with the channels last: 2023 values.

    Args:
        weights: torch-fidelity's state dict; torch.hub's cache or a download without one.
        device: Where to run.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If the file holds something else.
    """

    name = "inception"
    resize = "299x299 bilinear as TensorFlow 1"
    provides = frozenset({"pool", "spatial", "logits"})
    dims = {"pool": 2048, "spatial": 2023, "logits": 1008}  # noqa: RUF012
    is_inception = True

    def __init__(self, weights: str | None = None, device: torch.device | str = "cpu"):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        path = find_weights(weights, URL_INCEPTION_V3)
        load_state_dict(path)  # torch-fidelity would run the code in a pickle
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold torch-fidelity's Inception: {brief(error)}") from error
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

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If the file holds something else.
    """

    provides = frozenset({"pool"})
    dims = {"pool": 2048}  # noqa: RUF012
    is_inception = True

    def __init__(self, mode: str, weights: str | None = None, device: torch.device | str = "cpu"):
        from cleanfid.resize import build_resizer

        self.name, self.resize = f"cleanfid_{mode}", MODES[mode]
        self._resizer = build_resizer(mode)
        self._unit_range = mode == "legacy_pytorch"
        build = _pytorch_inception if mode == "legacy_pytorch" else _torchscript_inception
        self.network = build(weights, resize_inside=mode == "legacy_tensorflow").eval()
        self.fingerprint = fingerprint(self.network)
        self.network.to(device)

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """Return the image, resized as clean-fid does."""
        return torch.from_numpy(np.array(self._resizer(as_rgb(image)), dtype=np.float32)).permute(2, 0, 1)

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return pooled features."""
        features = self.network(batch / 255)[0].flatten(1) if self._unit_range else self.network(batch)
        return {"pool": features}


def _torchscript_inception(weights, resize_inside):
    from cleanfid.downloads_helper import inception_url
    from cleanfid.inception_torchscript import InceptionV3W

    path = find_weights(weights, inception_url)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "inception-2015-12-05.pt").symlink_to(path.resolve())  # clean-fid takes a folder
        try:
            return InceptionV3W(folder, download=False, resize_inside=resize_inside)
        except (RuntimeError, AttributeError) as error:
            raise ValueError(f"{path} is not the TorchScript Inception: {brief(error)}") from error


def _pytorch_inception(weights, resize_inside):
    from cleanfid import inception_pytorch

    path = find_weights(weights, inception_pytorch.FID_WEIGHTS_URL)
    state_dict = load_state_dict(path)
    # clean-fid has no argument for a local file.
    with mock.patch.object(inception_pytorch, "load_state_dict_from_url", return_value=state_dict):
        try:
            return inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold pytorch-fid's Inception: {brief(error)}") from error
