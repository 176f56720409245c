"""The run's own record of its losses: one JSON object a line, in step with the checkpoints."""

import json
from pathlib import Path

from ..files import write_atomically

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
