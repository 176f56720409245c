"""What a run observes of its steps: their values, the log file, and those that are not finite."""

import json
import math
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..utils.files import valid_json, write_atomically
from ..utils.reading import read_text

LOG_FILE = "log.jsonl"


class TrainingLog:
    """Appends records, one JSON object per line, to `output_dir/log.jsonl`.

    Args:
        output_dir: The run's folder.
        start_step: Step the run starts from; records of later steps, which are made again, are dropped.
    """

    def __init__(self, output_dir: Path, start_step: int):
        self.path = output_dir / LOG_FILE
        records = read_log(output_dir) if start_step else []
        self.records = [record for record in records if record["step"] <= start_step]
        self._rewritten = False

    def append(self, record: dict[str, float]) -> None:
        """Add a record, which has a `step`; values that are NaN or infinite are written as null.

        Raises:
            OSError: If it cannot be written, such as on a full disk; names the file.
        """
        self.records.append(record)
        if not self._rewritten:
            lines = "".join(map(_line, self.records))
            write_atomically(self.path, lambda path: path.write_text(lines))
            self._rewritten = True
            return
        try:
            with self.path.open("a") as file:
                file.write(_line(record))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def has(self, step: int, key: str) -> bool:
        """Return whether a record of a step has a key."""
        return any(record["step"] == step and key in record for record in self.records)


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """Read the records of a run, up to a last line that a kill may have cut off; null stands for NaN.

    Raises:
        OSError: If the log cannot be read.
        ValueError: If it is damaged; names the file and the line.
    """
    path = Path(output_dir) / LOG_FILE
    lines = read_text(path).splitlines(keepends=True) if os.path.lexists(path) else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            # Earlier versions wrote NaN.
            record = valid_json(json.loads(line))
        except (ValueError, RecursionError):
            if number == len(lines) and not line.endswith("\n"):
                break
            record = None
        if not isinstance(record, dict) or not _fits(record):
            raise ValueError(
                f"{path} is damaged in line {number}, which is no record of a step: restore the file, or delete that "
                "line."
            )
        records.append(record)
    return records


def _line(record):
    return json.dumps(valid_json(record), allow_nan=False) + "\n"


def _fits(record):
    """Return whether a record has a step, and numbers that a plot can show; NaN was made None."""
    numbers = [value for value in record.values() if value is not None]
    fit = all(isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 64) for value in numbers)
    return fit and isinstance(record.get("step"), int) and record["step"] >= 0


class StepValues:
    """Reads from the device what steps have computed, on CUDA while it computes the next step.

    There a value of the step just queued could be read only when the step is done, and meanwhile nothing would be
    queued for the device.

    Args:
        device: Device of the training.
    """

    def __init__(self, device: torch.device):
        self._delay = 1 if device.type == "cuda" else 0
        self._copies: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, values: torch.Tensor) -> None:
        """Begin to copy the values of a step."""
        copied = torch.cuda.Event() if values.device.type == "cuda" else None
        copy = values.to("cpu", non_blocking=copied is not None)  # in pinned memory
        if copied is not None:
            copied.record()
        self._copies.append((step, copy, copied))

    def pop(self, everything: bool) -> Iterator[tuple[int, list[float]]]:
        """Return steps and their values, in order: with `everything` all that were put, else those not delayed."""
        while len(self._copies) > (0 if everything else self._delay):
            step, copy, copied = self._copies.popleft()
            if copied is not None:
                copied.synchronize()
            yield step, copy.tolist()


class NonFiniteLossError(ValueError):
    """Too many consecutive losses or gradients were NaN or infinite, or weights that were to be saved are."""


class FiniteGuard:
    """Counts the steps that were skipped: those without a finite loss and gradient.

    Args:
        limit: Consecutive steps that may be skipped.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.skipped, self.skipped_in_a_row = 0, 0

    def count(self, step: int, loss: float, gradient_norm: float) -> None:
        """Count step `step`.

        Raises:
            NonFiniteLossError: If more than `limit` consecutive steps were skipped.
        """
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.limit:
            what, value = ("gradient norm", gradient_norm) if math.isfinite(loss) else ("loss", loss)
            raise NonFiniteLossError(
                f"The {what} is {value} at step {step}, and {self.limit} step(s) before it were skipped for the same "
                "reason. None of them changed the weights, and no checkpoint holds values that are not finite. Try a "
                "lower learning_rate or max_grad_norm, mixed_precision no or, for generation, qk_norm rms_norm. Start "
                "another run with its own output_dir, or resume with change_on_resume."
            )

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counts.

        Raises:
            KeyError: If one is missing.
            ValueError: If one is no count.
        """
        counts = state["skipped"], state["skipped_in_a_row"]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"The counts of skipped steps are {counts}.")
        self.skipped, self.skipped_in_a_row = counts
