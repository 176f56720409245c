"""Model and pipeline for diffusers. Saved pipelines name this subpackage as their components' library."""

from .pipeline_sdt import SDTPipeline
from .transformer_sdt import PRESETS, SDTTransformer2DModel

__all__ = ["PRESETS", "SDTPipeline", "SDTTransformer2DModel"]
