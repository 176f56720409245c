"""Muon ("Muon: An optimizer for hidden layers in neural networks", Jordan et al. 2024), beside AdamW.

torch.optim.Muon takes each parameter for one matrix and knows no shards, so the update stands here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from torch import distributed, nn

from ..attention import ContextAwareGate
from ..blocks import AdaLayerNormZero, SDTBlock
from .shards import full_tensor, local_part, shard_like

#: Coefficients and number of the Newton-Schulz iterations, as tuned by Jordan et al.: most singular values end within
#: 0.7 to 1.2.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
#: Root mean square of an update of AdamW, in units of the learning rate ("Muon is Scalable for LLM Training", Liu et
#: al. 2025, section 2.2), so that one learning rate serves both.
ADAMW_RMS = 0.2
#: Module of a block -> matrices that its linear layers stack, each with a use of its own. The gates of the decay map
#: to a few numbers each: they are AdamW's, as vectors are.
STACKED: dict[type[nn.Module], int] = {AdaLayerNormZero: 6, SwiGLU: 2, GEGLU: 2, ContextAwareGate: 0}


def muon_matrices(model: nn.Module) -> dict[str, int]:
    """Return the parameters that Muon moves, the weights of the blocks' linear layers: name -> matrices stacked."""
    return {
        f"{name}.{child}.weight": count
        for path, block in model.named_modules()
        if isinstance(block, SDTBlock)
        for name, parent in block.named_modules(prefix=path)
        for child, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and (count := STACKED.get(type(parent), 1))
    }


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Replace the singular values of matrices by about 1: U S V' becomes nearly U V'.

    Args:
        matrices: Shape (..., rows, columns).
        dtype: Type of the products and of the result. bf16 turns some of its rounding errors into directions of their
            own wherever a gradient has a lower rank than its matrix: 3.4445^5 = 485 times as large.

    Returns:
        Matrices of the same shape.
    """
    a, b, c = COEFFICIENTS
    x = (matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # the Gram matrix is the smaller one
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).contiguous()


class Muon(torch.optim.AdamW):
    """Muon for the groups of matrices, torch's fused AdamW for the others.

    With the gradient G of a matrix W, its momentum M, the learning rate lr and the weight decay wd of its group:

        M <- beta M + (1 - beta) G
        O  = orthogonalize((1 - beta) G + beta M)
        W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) O

    A parameter that stacks matrices is as many matrices. Processes share the work: each orthogonalizes its part of
    the parameters and sends them to the others, under DDP and FSDP2 alike.

    Args:
        groups: Groups of parameters, each with `num_matrices`, that its parameters stack; 0 for AdamW.
        momentum: Beta.
        dtype: See `orthogonalize`.
        **adamw: Arguments of `torch.optim.AdamW`.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], momentum: float, dtype: torch.dtype, **adamw: Any):
        super().__init__(groups, fused=True, **adamw)
        self.momentum, self.dtype = momentum, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step, unless `found_inf` is set; see `admit_step`."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = self.param_groups
        for group in groups:
            if group["num_matrices"]:
                self._move_matrices(group)
        self.param_groups = [group for group in groups if not group["num_matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _move_matrices(self, group: dict[str, Any]) -> None:
        """Move the matrices of a group, as many at a time as there are processes, those of like sizes together."""
        parameters = sorted((p for p in group["params"] if p.grad is not None), key=torch.Tensor.numel)
        process, processes = (
            (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        )
        for start in range(0, len(parameters), processes):
            together = parameters[start : start + processes]
            directions = [full_tensor(self._direction(parameter)) for parameter in together]
            directions = [
                orthogonalize(direction.unflatten(0, (group["num_matrices"], -1)), self.dtype).flatten(0, 1)
                if owner == process
                else torch.empty_like(direction, dtype=self.dtype)
                for owner, direction in enumerate(directions)
            ]
            if processes > 1:
                for owner, direction in enumerate(directions):
                    distributed.broadcast(direction, owner)
            for parameter, direction in zip(together, directions, strict=True):
                self._move(parameter, direction, group)

    def _direction(self, parameter: torch.Tensor) -> torch.Tensor:
        """Add the gradient to the momentum; return Nesterov's look ahead, of the parameter's shape."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None  # those without are left out
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp(gradient, 1 - self.momentum)
        self._settle(state["momentum_buffer"], momentum)
        return gradient.lerp(momentum, self.momentum)

    def _move(self, parameter: torch.Tensor, direction: torch.Tensor, group: dict[str, Any]) -> None:
        rows, columns = parameter.shape[0] // group["num_matrices"], parameter.shape[1]
        length = group["lr"] * ADAMW_RMS * math.sqrt(max(rows, columns))
        decayed = parameter * (1 - group["lr"] * group["weight_decay"])
        self._settle(parameter, decayed - length * shard_like(direction.to(parameter.dtype), parameter))

    def _settle(self, target: torch.Tensor, value: torch.Tensor) -> None:
        """Give a tensor its new value, unless the step is not to be made."""
        target, value, found_inf = local_part(target), local_part(value), getattr(self, "found_inf", None)
        target.copy_(value if found_inf is None else torch.where(found_inf > 0, target, value))
