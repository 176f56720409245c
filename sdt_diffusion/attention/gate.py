"""Context-aware gating (CAG): gates of the decay from tokens and a conditioning vector."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

#: Largest exponent: 1 - 2^-128 is 1 in every precision, so that nothing decays.
MAX_EXPONENT = 128

#: Values of the config key `decay_start`: the decay of a model that has not been trained.
DECAY_STARTS = {
    "rmt": "RMT's fixed decay; alpha = exp(log_alpha) starts at 1",
    "none": "so weak that attention is plain attention; alpha is the magnitude of a number that starts at 1e-7",
}
#: Start of alpha for `decay_start="none"`: changes no logit by more than fp32 rounds it.
NO_DECAY = 1e-7


def multi_scale_exponents(num_heads: int, initial_value: float, heads_range: float) -> list[float]:
    """Return RMT's exponents a_h = initial_value + heads_range * h / num_heads.

    Head h decays by log(1 - 2^-a_h) a patch.

    Raises:
        ValueError: If an exponent is not positive, as 2^-a has to be less than 1, or is more than `MAX_EXPONENT`.
    """
    lowest, highest = initial_value + min(heads_range, 0), initial_value + max(heads_range, 0)
    if not 0 < lowest <= highest <= MAX_EXPONENT:  # written so that NaN is refused too
        raise ValueError(
            f"Decay exponents from {initial_value} over a range of {heads_range} must be positive and at most "
            f"{MAX_EXPONENT}."
        )
    return [initial_value + heads_range * head / num_heads for head in range(num_heads)]


def check_start(decay_start: str) -> None:
    """Refuse what is no key of `DECAY_STARTS`.

    Raises:
        ValueError: The message lists the known ones.
    """
    if not isinstance(decay_start, str) or decay_start not in DECAY_STARTS:
        raise ValueError(f"Unknown decay_start {decay_start!r}: choose one of {', '.join(DECAY_STARTS)}.")


class ContextAwareGate(nn.Module):
    """G = log sigmoid(X W_g + b + c W_c), one value per token and head, computed in fp32 or better.

    W_g and W_c start at zero and b_h at log(2^a_h - 1), at which log sigmoid(b_h) = log(1 - 2^-a_h): the gate starts
    as RMT's fixed decay, with its range of near- and far-sighted heads. alpha = exp(log_alpha) starts at 1 and stays
    positive (at 0, -|M| would have no gradient and alpha would never change).

    With `decay_start="none"` nothing decays at first, for attention that was trained without: alpha = |a| with a at
    1e-7. dalpha/da is 1 however small a is, so that Adam moves alpha by the learning rate a step; exp(log_alpha) would
    need 16 / learning rate steps from there to 1, and so would a bias at which log sigmoid vanishes. An a that is
    pushed below 0 comes out above it, so no head is lost.

    Args:
        dim: Width of the tokens.
        num_heads: Attention heads.
        conditioning_dim: Width of the conditioning vector, or `None` for gates from content alone.
        initial_value: Exponent a of the most near-sighted head.
        heads_range: Span of the exponents over the heads.
        decay_start: One of `DECAY_STARTS`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        conditioning_dim: int | None = None,
        initial_value: float = 2.0,
        heads_range: float = 6.0,
        decay_start: str = "rmt",
    ):
        super().__init__()
        check_start(decay_start)
        self.exponents = multi_scale_exponents(num_heads, initial_value, heads_range)
        self.proj = nn.Linear(dim, num_heads)
        self.conditioning_proj = (
            None if conditioning_dim is None else nn.Linear(conditioning_dim, num_heads, bias=False)
        )
        if decay_start == "none":
            self.signed_alpha = nn.Parameter(torch.full((num_heads,), NO_DECAY))
        else:
            self.log_alpha = nn.Parameter(torch.zeros(num_heads))
        self.decay_start = decay_start
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the parameters as the docstring of the class describes."""
        nn.init.zeros_(self.proj.weight)
        self.proj.bias.copy_(torch.tensor([math.log(2**a - 1) for a in self.exponents]))
        if self.conditioning_proj is not None:
            nn.init.zeros_(self.conditioning_proj.weight)
        if self.decay_start == "none":
            nn.init.constant_(self.signed_alpha, NO_DECAY)
        else:
            nn.init.zeros_(self.log_alpha)

    def alpha(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the strength of the decay, at least 0, shape (heads,), computed in `dtype`."""
        return self.signed_alpha.to(dtype).abs() if self.decay_start == "none" else self.log_alpha.to(dtype).exp()

    def forward(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gate.

        Args:
            hidden_states: The tokens that queries, keys and values see, shape (batch, tokens, dim).
            conditioning: Shape (batch, conditioning_dim), or (batch, tokens, conditioning_dim); required if the gate
                was built with it, else unused.

        Returns:
            The gate G, shape (batch, heads, tokens), and alpha, shape (heads,).

        Raises:
            ValueError: If the conditioning is missing.
        """
        with _without_autocast(hidden_states.device.type):
            logits = _project(self.proj, hidden_states)  # (B, N, h)
            if self.conditioning_proj is not None:
                if conditioning is None:
                    raise ValueError("This gate was built with conditioning_dim and needs conditioning.")
                conditioning = conditioning if conditioning.ndim == 3 else conditioning.unsqueeze(1)  # (B, 1 or N, c)
                logits = logits + _project(self.conditioning_proj, conditioning)
            gate = F.logsigmoid(logits).transpose(1, 2)  # (B, h, N)
            return gate, self.alpha(logits.dtype)


class FixedGate(nn.Module):
    """RMT's constant decay: G = log(1 - 2^-a_h) for every token, alpha = 1, no learned parameters.

    It holds no tensors, so that no cast of the model can round the decay.
    """

    def __init__(self, num_heads: int, initial_value: float = 2.0, heads_range: float = 6.0):
        super().__init__()
        self.exponents = multi_scale_exponents(num_heads, initial_value, heads_range)

    def forward(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gate of shape (1, heads, 1) and alpha of shape (heads,), both constant."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        decay = [math.log1p(-(2**-a)) for a in self.exponents]
        gate = torch.tensor(decay, dtype=dtype, device=hidden_states.device)  # (h,)
        return gate[None, :, None], torch.ones_like(gate)


def build_gate(
    variant: str,
    dim: int,
    num_heads: int,
    conditioning_dim: int | None = None,
    initial_value: float = 2.0,
    heads_range: float = 6.0,
    decay_start: str = "rmt",
) -> nn.Module | None:
    """Build the gate that a spatial decay variant needs; `None` for `none`."""
    check_start(decay_start)
    if variant == "none":
        return None
    if variant == "fixed":
        return FixedGate(num_heads, initial_value, heads_range)
    return ContextAwareGate(dim, num_heads, conditioning_dim, initial_value, heads_range, decay_start)


def _project(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call the module, which offloading and LoRA hook into, in the dtype of its weight: fp32 unless it was cast."""
    logits = linear(x.to(linear.weight.dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _without_autocast(device_type):
    # The meta device, on which costs are counted, has no autocast to disable.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
