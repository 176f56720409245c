"""Means of what is logged."""

import math
import time


class Window:
    """The steps since something was last logged: their losses, and the time they took."""

    def __init__(self):
        self.steps, self.losses, self.norms = 0, [], []
        self.seconds, self._since = 0.0, time.perf_counter()

    def add(self, loss: float, norm: float) -> None:
        """Counts a step; one that is not finite has no part in the means."""
        self.steps += 1
        if math.isfinite(loss) and math.isfinite(norm):
            self.losses.append(loss)
            self.norms.append(norm)

    def pause(self) -> None:
        """Stops the clock, for checkpoints and what the caller of the loop does."""
        self.seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Starts the clock again."""
        self._since = time.perf_counter()

    def means(self) -> dict[str, float]:
        """Mean loss and norm of the gradient; nothing if no step was finite."""
        if not self.losses:
            return {}
        return {"loss": sum(self.losses) / len(self.losses), "grad_norm": sum(self.norms) / len(self.norms)}
