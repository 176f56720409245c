"""Which parameters a learning rate of their own, or weight decay, is meant for, by their names."""

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..attention import ContextAwareGate
from ..utils.ranges import Range, check_number
from ..utils.reading import shortened

#: Factors of a learning rate.
FACTORS = Range(0, 1e6, with_least=False)


def parse_factors(pairs: Sequence[str]) -> dict[str, float]:
    """Read the pairs of `lr_groups`: patterns of names -> factors of their learning rate.

    Args:
        pairs: Such as "gate=10".

    Raises:
        ValueError: If a pair is not of this form, or a pattern is given twice.
    """
    factors: dict[str, float] = {}
    for pair in pairs:
        pattern, _, number = pair.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            pattern = ""
        if not pattern:
            raise ValueError(f"lr_groups takes pairs of a name and a factor, such as gate=10, not {pair!r}.")
        if pattern in factors:
            raise ValueError(f"lr_groups has {pattern!r} twice.")
        check_number(f"lr_groups {pattern}", factor, FACTORS)
        factors[pattern] = factor
    return factors


def matches(name: str, pattern: str) -> bool:
    """Return whether whole parts of a dotted name fit: "gate" and "attn.gate" fit "0.attn.gate.proj.weight"."""
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def check_patterns(patterns: Iterable[str], names: Collection[str]) -> None:
    """Refuse patterns that match none of the trained parameters.

    Raises:
        ValueError: Names the pattern, and what could have been meant.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
            raise ValueError(
                f"lr_groups: {pattern!r} matches no trained parameter. Their names have the parts "
                f"{shortened(parts, 30)}."
            )


def decayed_names(model: nn.Module) -> set[str]:
    """Return the parameters that weight decay pulls on: the weights of linear layers and convolutions.

    Biases, norms, embeddings and parameters of no such layer are left out, as in nanoGPT and in timm's models, and so
    are the gates of the spatial decay, whose zero is not "nothing" but one range of attention.
    """
    layers = (nn.Linear, nn.modules.conv._ConvNd)  # torch's common base of its convolutions has no public name
    gates = {part for gate in model.modules() if isinstance(gate, ContextAwareGate) for part in gate.modules()}
    return {
        f"{path}.weight".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, layers) and module not in gates
    }
