"""Extractors saved by transformers: DINOv2 and image classifiers, with helpers to load and call classifiers."""

import hashlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ...data.decoding import IMAGE_MODES, ImageMode
from ...utils.fingerprint import fingerprint
from ...utils.pretrained import brief, load_network, load_pretrained
from .base import FeatureExtractor, as_rgb

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
#: Largest ratio of a picture's sides.
MAX_ASPECT_RATIO = 100


class DINOv2(FeatureExtractor):
    """The class token of DINOv2 (Stein et al. 2023 take ViT-L/14) for images resized to 224 x 224.

    Args:
        weights: Folder or Hub name of a transformers `Dinov2Model`.
        device: Where to run.

    Raises:
        FileNotFoundError: If the model cannot be loaded.
        ValueError: If it is another model, or weights are missing or not finite.
    """

    name = "dinov2"
    resize = "224x224 bicubic of Pillow, antialiased"
    provides = frozenset({"pool"})

    def __init__(self, weights: str | None = None, device: torch.device | str = "cpu"):
        from transformers import AutoConfig, AutoModel

        weights = weights or "facebook/dinov2-large"
        kind = load_pretrained(AutoConfig, weights, "a DINOv2 model").model_type
        if kind != "dinov2":
            raise ValueError(f"extractor_weights: {weights} holds a {kind}, not a DINOv2.")
        self.network = load_network(AutoModel, weights, "a DINOv2 model")
        self.fingerprint = fingerprint(self.network)
        self.network.to(device)
        self.dims = {"pool": self.network.config.hidden_size}

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """Return the image, resized and normalized by ImageNet's statistics."""
        resized = Image.fromarray(as_rgb(image)).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
        return (pixels - IMAGENET_MEAN) / IMAGENET_STD

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the class token."""
        return {"pool": self.network(batch).last_hidden_state[:, 0]}


class ImageClassifier(FeatureExtractor):
    """Logits of an image classifier, and the inputs of its last linear layer.

    Args:
        folder: Folder or Hub name of a model for `AutoModelForImageClassification` with its image processor.
        device: Where to run.

    Raises:
        FileNotFoundError: If the model cannot be loaded.
        ValueError: If weights are missing, or it does not end in a linear layer.
    """

    provides = frozenset({"pool", "logits"})

    def __init__(self, folder: str, device: torch.device | str = "cpu"):
        self.name = f"classifier {folder}"
        self.network, self._processor = load_classifier(folder, "float32", device)
        settings = hashlib.sha256(self._processor.to_json_string().encode()).hexdigest()[:16]
        self.resize = f"its image processor, {settings}"
        self._channels = channels_of(self.network)
        self.fingerprint = fingerprint(self.network)
        heads = [
            module
            for module in self.network.modules()
            if isinstance(module, nn.Linear) and module.out_features == self.network.config.num_labels
        ]
        if not heads:
            raise ValueError(f"{folder} does not end in a linear layer, whose inputs would be its features.")
        heads[-1].register_forward_pre_hook(self._keep_input)

    def _keep_input(self, module, inputs):
        self._pool = inputs[0]

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """Return the image as the classifier's image processor makes it."""
        image = as_rgb(image) if self._channels == 3 else image
        if image.shape[2] != self._channels:
            raise ValueError(f"the classifier takes {self._channels} channels, not {image.shape[2]}")
        return process(self._processor, image, input_data_format="channels_last")

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the inputs of the last linear layer, and the logits."""
        logits = self.network(batch).logits
        return {"pool": self._pool.flatten(1), "logits": logits}

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for features to be comparable; the folder need not be."""
        return {**super().identity, "extractor": "classifier"}


def load_classifier(name: str, dtype: str, device: torch.device | str) -> tuple[nn.Module, Any]:
    """Load an image classifier of transformers or this project, and its image processor.

    Raises:
        FileNotFoundError: If they cannot be loaded.
        ValueError: If weights are missing, which transformers would initialize at random.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    import sdt_diffusion.classification  # noqa: F401 (registers this project's classifiers with the Auto classes)

    model = load_network(AutoModelForImageClassification, name, "an image classifier", dtype=getattr(torch, dtype))
    labels = model.config.id2label
    if set(labels) != set(range(len(labels))) or not all(isinstance(label, str) for label in labels.values()):
        raise ValueError(f"{name}: id2label in its config.json must give a name to each label from 0 on.")
    processor = load_pretrained(AutoImageProcessor, name, "an image processor")
    for key, value in processor.to_dict().items():
        if key.startswith("do_") and value is not None and not isinstance(value, bool):
            raise ValueError(
                f"{name}: {key} in its preprocessor_config.json must be true or false, not {value!r:.60}."
            )
    return model.to(device), processor


def channels_of(classifier: nn.Module) -> int:
    """Return the number of channels of a classifier's images."""
    return getattr(classifier.config, "num_channels", 3)


def image_mode_for(num_channels: int) -> ImageMode:
    """Return the mode of images of a number of channels.

    Raises:
        ValueError: If there is none.
    """
    if num_channels not in IMAGE_MODES:
        raise ValueError(f"The model takes images of {num_channels} channels; only 1 and 3 can be read.")
    return IMAGE_MODES[num_channels]


def prepare_picture(picture: Image.Image, processor: Any, num_channels: int) -> torch.Tensor:
    """Return a picture as the model's image processor makes it, shape (num_channels, height, width).

    Raises:
        ValueError: If the picture is too long for its width, or the processor fails or makes another number of
            channels.
    """
    long, short = max(picture.size), min(picture.size)
    if long > MAX_ASPECT_RATIO * short:  # processors enlarge the short side, and the long side as much
        raise ValueError(f"its sides differ too much: {picture.width}x{picture.height} pixels")
    if num_channels == 3:
        pixel_values = process(processor, picture)
    else:  # processors differ in how they read gray PIL images
        pixel_values = process(processor, np.array(picture)[:, :, None], input_data_format="channels_last")
    if len(pixel_values) != num_channels:
        raise ValueError(
            f"The image processor makes {len(pixel_values)} channels, but the model takes {num_channels}: give "
            "image_mean and image_std as many values in preprocessor_config.json."
        )
    return pixel_values


def process(processor: Any, picture: Image.Image | np.ndarray, **kwargs: Any) -> torch.Tensor:
    """Call an image processor for one picture.

    Raises:
        ValueError: If it fails, as one with settings that make no sense does.
    """
    try:
        return processor(picture, return_tensors="pt", **kwargs)["pixel_values"][0]
    except Exception as error:
        raise ValueError(f"the image processor fails ({brief(error)}): check preprocessor_config.json") from error


def undo_normalization(pixel_values: torch.Tensor, processor: Any) -> Image.Image:
    """Return the picture of pixel values that an image processor normalized."""
    pixels = pixel_values.float().cpu()
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    values = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(values.squeeze())
