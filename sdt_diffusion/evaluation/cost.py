"""The cost of a network: parameters and arithmetic."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..attention_processor import set_decay_backend
from ..blocks import SDTAttention


@dataclass(frozen=True)
class Cost:
    """Parameters of a network, and the arithmetic of one forward pass in both of the units that papers call FLOPs.

    Args:
        parameters: Number of parameters.
        multiply_adds: Multiply-adds of convolutions and matrix products, attention among them.
    """

    parameters: int
    multiply_adds: int

    @property
    def gibi_multiply_adds(self) -> float:
        """Multiply-adds / 2^30, the unit that RMT publishes."""
        return self.multiply_adds / 2**30

    @property
    def gflops(self) -> float:
        """10^9 operations, two a multiply-add."""
        return 2 * self.multiply_adds / 1e9

    def as_dict(self) -> dict[str, float]:
        """Return all values, for records."""
        return {**asdict(self), "multiply_adds_2_30": self.gibi_multiply_adds, "gflops": self.gflops}


@torch.no_grad()
def count_cost(model: nn.Module, *inputs: Any, **options: Any) -> Cost:
    """Count the parameters of a model, and the multiply-adds of `model(*inputs, **options)`.

    Element-wise work, norms and the softmax are not counted, as is usual.

    Args:
        model: The model; its mode and processors are left as they are.
        *inputs: Inputs of the model; a batch of one image for the cost of one.
        **options: The same, by name.
    """
    with _reference_attention_in(model), FlopCounterMode(display=False) as counter:
        model(*inputs, **options)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


@contextmanager
def _reference_attention_in(model: nn.Module) -> Iterator[None]:
    """Make spatial decay attention use torch's own operators, which the counter supports."""
    modules = [module for module in model.modules() if isinstance(module, SDTAttention)]
    processors = [module.processor for module in modules]
    try:
        if modules:
            set_decay_backend(model, "reference")
        yield
    finally:
        for module, processor in zip(modules, processors, strict=True):
            module.set_processor(processor)
