"""Model and pipeline for diffusers. Saved pipelines name this subpackage as their components' library."""

from .flow_sde import FlowMatchSDEScheduler
from .guidance import GUIDANCE_KINDS, SDTGuidance
from .pipeline_sdt import SDTPipeline
from .presets import PRESETS
from .token_route import TokenRoute
from .transformer_sdt import SDTTransformer2DModel

__all__ = [
    "GUIDANCE_KINDS",
    "PRESETS",
    "FlowMatchSDEScheduler",
    "SDTGuidance",
    "SDTPipeline",
    "SDTTransformer2DModel",
    "TokenRoute",
]
