"""Spatial decay attention on plain tensors; this folder depends on torch only."""

from .dispatch import BACKENDS, check_backend, spatial_decay_attention
from .formula import SPATIAL_DECAY_VARIANTS, Decay, check_variant, manhattan_distance, spatial_decay
from .gate import ContextAwareGate, FixedGate, build_gate

__all__ = [
    "BACKENDS",
    "SPATIAL_DECAY_VARIANTS",
    "ContextAwareGate",
    "Decay",
    "FixedGate",
    "build_gate",
    "check_backend",
    "check_variant",
    "manhattan_distance",
    "spatial_decay",
    "spatial_decay_attention",
]
