"""Spatial Decay Transformers (SDT) for class-conditional image generation, on diffusers."""

import diffusers
import diffusers.pipelines

from . import sdt
from .sdt import SDTGuidance, SDTPipeline, SDTTransformer2DModel
from .sdt.flow_sde import FlowMatchSDEScheduler
from .sdt.schedulers import swap_scheduler

__version__ = "0.1.0"
__all__ = ["FlowMatchSDEScheduler", "SDTGuidance", "SDTPipeline", "SDTTransformer2DModel", "swap_scheduler"]


def _register_with_diffusers() -> None:
    """Make `DiffusionPipeline.from_pretrained` find the classes named in a saved `model_index.json`.

    diffusers looks a pipeline class and the classes that a scheduler's config fits up as its own attributes, and a
    component as an attribute of a subpackage of `diffusers.pipelines`: `sdt_diffusion`, and `sdt` in folders of 0.1.
    """
    for owner, name, value in (
        (diffusers, "SDTPipeline", SDTPipeline),
        (diffusers, "SDTTransformer2DModel", SDTTransformer2DModel),
        (diffusers, "FlowMatchSDEScheduler", FlowMatchSDEScheduler),
        (diffusers.pipelines, "sdt_diffusion", sdt),
        (diffusers.pipelines, "sdt", sdt),
    ):
        if not hasattr(owner, name):
            setattr(owner, name, value)


_register_with_diffusers()
