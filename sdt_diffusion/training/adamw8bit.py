"""AdamW with moments of 8 bits ("8-bit Optimizers via Block-wise Quantization", Dettmers et al. 2022)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

#: bitsandbytes' own: smaller parameters have moments in fp32, larger ones have a scale for each block of numbers.
LEAST_NUMEL, BLOCK = 4096, 256


def build_adamw8bit(groups: Sequence[dict[str, Any]], **adamw: Any) -> torch.optim.Optimizer:
    """Build bitsandbytes' AdamW8bit, which asks the device before each step whether to make it; see `admit_step`.

    Args:
        groups: Groups of parameters.
        **adamw: Its arguments.

    Raises:
        ValueError: If bitsandbytes cannot be imported.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            'optimizer adamw8bit needs bitsandbytes, which is not installed: run pip install "sdt_diffusion[bnb]".'
        ) from error

    class AdmittedAdamW8bit(AdamW8bit):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            if getattr(self, "found_inf", False):
                return None
            return super().step(closure)

        def init_state(self, group, p, gindex, pindex):
            self.state[p].update(initial_8bit_state(p))  # no memory in common, unlike bitsandbytes' own

    return AdmittedAdamW8bit(groups, **adamw)


def initial_8bit_state(parameter: torch.Tensor) -> dict[str, Any]:
    """Return AdamW8bit's state of a parameter that it has not moved yet, as it is stored in checkpoints."""
    is_small = parameter.numel() < LEAST_NUMEL
    moments = {
        key: torch.zeros_like(parameter, dtype=torch.float32 if is_small else torch.uint8, requires_grad=False)
        for key in ("state1", "state2")
    }
    if is_small:
        return {"step": 0, **moments}
    from bitsandbytes.functional import create_dynamic_map

    def scales():
        return torch.zeros(-(-parameter.numel() // BLOCK), device=parameter.device)

    return {
        "step": 0,
        **moments,
        "qmap1": create_dynamic_map(signed=True).to(parameter.device),
        "qmap2": create_dynamic_map(signed=False).to(parameter.device),
        "absmax1": scales(),
        "absmax2": scales(),
    }
