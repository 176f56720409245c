"""Means of what is logged."""

import json
import math
import time
from pathlib import Path

from ..utils.files import write_atomically


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


LOG_FILE = "log.jsonl"


class TrainingLog:
    """Appends records to `output_dir/log.jsonl`.

    Args:
        output_dir: The run's folder.
        start_step: Step the run starts from; later records, of steps that are about to be done again, are dropped.
    """

    def __init__(self, output_dir: Path, start_step: int):
        self.path = output_dir / LOG_FILE
        records = read_log(output_dir) if start_step else []  # what starts anew has no past
        self.records = [record for record in records if record["step"] <= start_step]
        self._rewritten = False

    def append(self, record: dict[str, float]) -> None:
        """Adds a record, which has a `step`."""
        self.records.append(record)
        if not self._rewritten:
            lines = "".join(json.dumps(record) + "\n" for record in self.records)
            write_atomically(self.path, lambda path: path.write_text(lines))
            self._rewritten = True
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_log(output_dir: Path) -> list[dict[str, float]]:
    """The records of a run; a last line cut short by a kill is left out."""
    path = Path(output_dir) / LOG_FILE
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


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
