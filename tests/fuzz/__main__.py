"""Try hostile command lines, damaged files, full disks and signals on all scripts, and sort what comes back.

    python -m tests.fuzz --cases 2000 --seed 0 --output outputs/fuzz
    python -m tests.fuzz --only 17 --seed 0 --output outputs/fuzz   # one case again, with all that it prints

Writes cases.jsonl, a line for each case, and summary.json and summary.md. The same command continues where it was
stopped. The exit code is 1 if a case went wrong.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_MININTERVAL": "1"}
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's thread, which no fork has
os.environ.pop("HF_TOKEN", None)

from tqdm import tqdm

from tests.scripts.forks import import_all

from .cases import Case
from .judge import GOOD
from .subjects import build_template


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="The first case; the first of all are good commands.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=60, help="When a case counts as hanging.")
    parser.add_argument("--only", type=int, help="Run this case only, show all it prints, and keep its folder.")
    args = parser.parse_args()
    root = args.output.absolute()
    (root / "good").mkdir(parents=True, exist_ok=True)
    import_all()
    if not (root / "template").is_dir():
        build_template(root / "template")
    # Loaders' workers make sockets below a case's folder, whose paths may have 107 characters.
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    if args.only is not None:
        case = Case(root, work, args.seed, args.only, args.seconds)
        print(json.dumps(case.run(), indent=2))
        print(f"--- stdout\n{case.ended.out}\n--- stderr\n{case.ended.err}\n--- {case.folder}")
        return
    lines = root / "cases.jsonl"
    done = read_lines(lines)
    todo = [number for number in range(args.start, args.cases) if number not in {line["case"] for line in done}]
    bar = tqdm(total=len(todo), unit="case", smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 10)
    try:
        with lines.open("a") as file:
            for line in run_all(root, work, args.seed, todo, args.jobs, args.seconds):
                done.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
                bar.set_postfix(bad=sum(not line["good"] for line in done), refresh=False)
                bar.update()
    finally:
        shutil.rmtree(work, ignore_errors=True)
        bar.close()
    table = summarize(done, root)
    print(table)
    sys.exit(any(not line["good"] for line in done))


def read_lines(path: Path) -> list[dict]:
    """Read the cases that are done; a line that was cut is done again."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run_all(root: Path, work: Path, seed: int, numbers: list[int], jobs: int, seconds: float):
    """Yield the lines of cases as they end; each case has a process of its own, `jobs` at a time."""
    running: dict[int, int] = {}
    numbers = list(reversed(numbers))
    try:
        while numbers or running:
            while numbers and len(running) < jobs:
                number = numbers.pop()
                pid = os.fork()
                if pid == 0:
                    run_one(root, work, seed, number, seconds)
                running[pid] = number
            pid, _ = os.wait()
            number = running.pop(pid)
            path = work / f"{number}.json"
            yield json.loads(path.read_text())
            path.unlink()
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)


def run_one(root: Path, work: Path, seed: int, number: int, seconds: float) -> None:
    """Run a case and end this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the case's own child is killed too
    case = Case(root, work, seed, number, seconds)
    try:
        line = case.run()
    except SystemExit:
        os._exit(143)
    except Exception:  # a mistake of this harness, which must not end the others
        error = traceback.format_exc()
        line = {"case": number, "kind": case.kind, "base": case.name, "outcome": "harness error", "remark": error}
        line |= {"script": case.base.script, "command": [], "damage": "", "good": False, "seconds": 0}
        line |= {"last_line": error.splitlines()[-1]}
    finally:
        shutil.rmtree(work / str(number), ignore_errors=True)
    (work / f"{number}.json").write_text(json.dumps(line))
    os._exit(0)


def summarize(lines: list[dict], root: Path) -> str:
    """Write summary.json and summary.md; return the table: kinds of case by outcomes, the good ones first."""
    counts = Counter((line["kind"], line["outcome"]) for line in lines)
    kinds = sorted({kind for kind, _ in counts})
    outcomes = sorted({outcome for _, outcome in counts}, key=lambda name: (name not in GOOD, name))
    rows = [[kind, *(counts[kind, outcome] for outcome in outcomes)] for kind in kinds]
    rows.append(["all", *(sum(counts[kind, outcome] for kind in kinds) for outcome in outcomes)])
    rows = [[*row, sum(row[1:])] for row in rows]
    header = ["", *outcomes, "all"]
    table = "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows])
    (root / "summary.md").write_text(table + "\n")
    values = {kind: {outcome: counts[kind, outcome] for outcome in outcomes} for kind in kinds}
    (root / "summary.json").write_text(json.dumps(values, indent=2))
    return table


if __name__ == "__main__":
    main()
