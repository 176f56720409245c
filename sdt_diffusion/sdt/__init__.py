"""Model and pipeline for diffusers. Saved pipelines name this subpackage as their components' library."""

from .guidance import GUIDANCE_KINDS, SDTGuidance
from .pipeline_sdt import SDTPipeline
from .transformer_sdt import PRESETS, SDTTransformer2DModel

__all__ = ["GUIDANCE_KINDS", "PRESETS", "SDTGuidance", "SDTPipeline", "SDTTransformer2DModel"]
