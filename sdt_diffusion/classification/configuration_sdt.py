"""SDTClassifierConfig: a classifier on a generative transformer, as transformers' config."""

from typing import Any

from transformers import PretrainedConfig


class SDTClassifierConfig(PretrainedConfig):
    """Config of `SDTForImageClassification`.

    Args:
        transformer: Config of the whole `SDTTransformer2DModel`.
        block: Its block whose tokens are the features; those above it are not part of the classifier.
        timestep: What the transformer is told of the noise in its input.
        signal_scale: What the image is multiplied by.
        noise_scale: What the noise that is added to it is multiplied by.
        noise_seed: Seed of the noise in evaluation.
        vae: Config of the VAE, with the name of its class as `_class_name`; `None` for pixels.
        freeze_backbone: Whether training leaves the transformer as it is.
        num_channels: Channels of the images.
        **kwargs: What every config takes, such as `id2label`.
    """

    model_type = "sdt_classifier"

    def __init__(
        self,
        transformer: dict[str, Any] | None = None,
        block: int = 0,
        timestep: float = 0.0,
        signal_scale: float = 1.0,
        noise_scale: float = 0.0,
        noise_seed: int = 0,
        vae: dict[str, Any] | None = None,
        freeze_backbone: bool = True,
        num_channels: int = 3,
        **kwargs,
    ):
        self.transformer, self.block, self.vae = transformer or {}, block, vae
        self.timestep, self.signal_scale, self.noise_scale = timestep, signal_scale, noise_scale
        self.noise_seed, self.freeze_backbone, self.num_channels = noise_seed, freeze_backbone, num_channels
        super().__init__(**kwargs)
