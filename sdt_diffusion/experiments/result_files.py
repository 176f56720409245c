"""Results files of cells: one small JSON file each."""

import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..hub.run_record import PACKAGES
from ..utils.files import valid_json, write_atomically
from ..utils.fingerprint import differences
from ..utils.reading import read_json
from .study import Cell, Evaluation, Study

#: What every results file has, and the type of each.
TYPES: dict[str, type | tuple[type, ...]] = {
    **{"study": str, "variant": str, "seed": int, "config": dict, "versions": dict, "commit": str, "cpu": str},
    **{"seconds": (int, float), "failed": (str, type(None))},
}
#: What those of cells that did not fail have besides.
TYPES_OF_FINISHED: dict[str, type | tuple[type, ...]] = {
    **{"all_arguments": dict, "parameters": int, "steps": int, "images_per_step": int, "curves": dict},
    **{"metrics": dict, "seconds_per_step": (int, float), "seconds_per_step_first_decile": (int, float)},
}


def result_path(folder: Path, cell: Cell) -> Path:
    """Return the results file of a cell."""
    return folder / cell.study / f"{cell.name}.json"


def write_result(path: Path, record: dict[str, Any]) -> None:
    """Write a results file, a line for each key."""
    lines = [f"  {json.dumps(key)}: {json.dumps(valid_json(value))}" for key, value in record.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_result(path: Path, cell: Cell) -> dict[str, Any]:
    """Read the results file of a cell.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged, or of other arguments than the cell's; names the file and what differs.
    """
    record = read_json(path)
    types = TYPES if record.get("failed") is not None else {**TYPES, **TYPES_OF_FINISHED}
    for key, kind in types.items():
        if key not in record or not isinstance(record[key], kind):
            raise ValueError(f"{path} is damaged: {key} is {record.get(key)!r:.60}.")
    config = {**record["config"], "evaluation": _with_defaults(record["config"].get("evaluation"), path)}
    found = [
        *differences(_identity(record["study"], record["variant"], record["seed"]), _identity_of(cell)),
        *differences(_flat(config), _flat(json.loads(json.dumps(cell.config)))),
    ]
    if found:
        raise ValueError(
            f"{path} is of another cell than the study's ({'; '.join(found)}): delete the file to run the cell anew, "
            "or give the variant another name."
        )
    return record


def _with_defaults(evaluation: Any, path: Path) -> dict[str, Any]:
    """Return an evaluation with the defaults of what did not exist when its file was written."""
    try:
        return json.loads(json.dumps(asdict(Evaluation(**evaluation))))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its evaluation is {evaluation!r:.60}.") from error


def read_results(folder: Path, study: Study) -> dict[tuple[str, int], dict[str, Any]]:
    """Read all results of a study, by variant and seed; cells that have not run are left out.

    Raises:
        ValueError: If a file is damaged, of other arguments, or of no cell of the study; names it.
    """
    files = {result_path(folder, cell): cell for cell in study.cells()}
    strange = sorted(set((folder / study.name).glob("*.json")) - set(files))
    if strange:
        raise ValueError(f"{strange[0]} is of no cell of the study: delete it, or put the variant or seed back.")
    return {(cell.variant, cell.seed): read_result(path, cell) for path, cell in files.items() if path.is_file()}


def describe_machine() -> dict[str, Any]:
    """Return versions, commit and processor, for a results file."""
    from importlib.metadata import version

    return {
        "versions": {**{package: version(package) for package in PACKAGES}, "python": platform.python_version()},
        "commit": _commit(),
        "cpu": _cpu(),
    }


def _commit() -> str:
    """Return the commit of the package's source, marked if the source has been changed since."""
    folder = Path(__file__).parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cpu() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _identity(study: Any, variant: Any, seed: Any) -> dict[str, Any]:
    return {"study": study, "variant": variant, "seed": seed}


def _identity_of(cell: Cell) -> dict[str, Any]:
    return _identity(cell.study, cell.variant, cell.seed)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a config under single keys, so that differences name them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat
