"""Steps whose loss or gradient is NaN or infinite: left out, counted, and no more than a few in a row."""

import math


class NonFiniteLossError(RuntimeError):
    """Too many losses or gradients in a row were NaN or infinite."""


class FiniteGuard:
    """Decides which steps are made.

    Args:
        limit: Steps in a row that may be left out.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.skipped, self.skipped_in_a_row = 0, 0

    def admits(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Whether to make step `step`.

        Raises:
            NonFiniteLossError: If more than `limit` in a row were not to be made.
        """
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.limit:
            what, value = ("gradient norm", gradient_norm) if math.isfinite(loss) else ("loss", loss)
            raise NonFiniteLossError(
                f"The {what} is {value} at step {step}, and {self.limit} step(s) before it were left out for the same "
                "reason. None of them changed the weights; the last checkpoint is sound. What helps: a lower "
                "--learning_rate or --max_grad_norm, --mixed_precision no, for generation --qk_norm rms_norm; each of "
                "them is another run, with its own --output_dir."
            )
        return False

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes over counts."""
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
