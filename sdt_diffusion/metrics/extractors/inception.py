"""The Inception network of published FIDs, through torch-fidelity."""

import numpy as np
import torch

from ...fingerprint import fingerprint
from .base import FeatureExtractor, as_rgb
from .weights import brief, find_weights, load_state_dict


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
        load_state_dict(path)  # torch-fidelity would run whatever a pickle asks for
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
        return torch.from_numpy(as_rgb(image)).permute(2, 0, 1)

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        pool, logits = self.network(batch)
        return {"pool": pool, "spatial": self._spatial, "logits": logits}
