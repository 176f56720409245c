"""A trained generative model as the lower part of a classifier."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import SchedulerMixin
from torch import nn

from ..data.decoding import IMAGE_MODES
from ..sdt import SDTTransformer2DModel
from ..sdt.latents import vae_spatial_scale
from ..training.objectives import DIT_SCHEDULE


@dataclass
class Backbone:
    """A transformer, what it was trained on, and the VAE whose latents it works in.

    Args:
        transformer: The transformer.
        scheduler: The scheduler that is saved with it, or one of the same noise levels.
        vae: The VAE; `None` for pixels.
    """

    transformer: SDTTransformer2DModel
    scheduler: SchedulerMixin
    vae: nn.Module | None = None

    @property
    def resolution(self) -> int:
        """Side of the images it was trained on, in pixels.

        Raises:
            ValueError: If they are no squares.
        """
        size = self.transformer.config.sample_size
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) > 1:
            raise ValueError(
                f"The transformer's images are no squares (sample_size {size}); the classifier takes those."
            )
        return sides.pop() * vae_spatial_scale(self.vae)

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return (self.transformer if self.vae is None else self.vae).config.in_channels

    @property
    def image_mode(self) -> str:
        """Their mode.

        Raises:
            ValueError: If they are neither grey nor colour.
        """
        if self.num_channels not in IMAGE_MODES:
            raise ValueError(
                f"The transformer works in {self.num_channels} channels, which are no pixels: give the folder of the "
                "pipeline, with its VAE."
            )
        return IMAGE_MODES[self.num_channels]


def load_backbone(folder: str, objective: str | None = None) -> Backbone:
    """A trained pipeline or transformer.

    Args:
        folder: Where `save_pretrained` wrote it.
        objective: "flow" (the default) or "ddpm" (DiT's schedule), for a transformer without a pipeline.

    Raises:
        ValueError: If a pipeline is given an objective, or has no SDT transformer.
    """
    if (Path(folder) / "model_index.json").is_file():
        if objective is not None:
            raise ValueError(f"--probe_objective is not for a pipeline: the scheduler of {folder} tells it.")
        pipe = DiffusionPipeline.from_pretrained(folder)
        transformer = getattr(pipe, "transformer", None)
        if not isinstance(transformer, SDTTransformer2DModel):
            raise ValueError(f"{folder} is a {type(pipe).__name__} without an SDTTransformer2DModel.")
        return Backbone(transformer, pipe.scheduler, pipe.vae)
    scheduler = DDPMScheduler(**DIT_SCHEDULE) if objective == "ddpm" else FlowMatchEulerDiscreteScheduler()
    return Backbone(SDTTransformer2DModel.from_pretrained(folder, dtype=torch.float32), scheduler)
