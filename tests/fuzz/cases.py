"""Draw a case, run it in a folder of its own, and tell what came of it."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

from .bases import BASES
from .child import Ended, Limits, run_child
from .commands import Draw, draw_command, draw_secret, draw_yaml, fields_of, prepare
from .damage import damage
from .formats import NONSENSE
from .judge import GOOD, half_written, holds_token, judge, results_of, snapshot

#: Kind of case -> how many of a hundred.
KINDS = {"command": 32, "yaml": 9, "secret": 4, "damage": 36, "resume": 9, "full disk": 5, "signal": 5}
#: A run that was asked for much work is stopped after so many seconds.
LONG_RUN_SECONDS = 10
#: Endings of what belongs to the user; see `judge`.
CONTENT = (".png", ".parquet", ".tar", ".txt", ".yaml", ".json", ".jsonl", ".npz", ".md")
#: Files of ours in such a format whose every bit counts.
OURS = ("manifest.json", "checkpoint.json")
PUSHING = ("train", "classify", "share")


class Case:
    """Case `number` of a seed, always the same one; `root` has the good files, `work` a folder for each case."""

    def __init__(self, root: Path, work: Path, seed: int, number: int, seconds: float):
        self.root, self.work, self.number, self.seconds = root, work, number, seconds
        self.rng = random.Random(f"{seed}-{number}")
        self.kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
        names = sorted(BASES)
        if number < len(names):  # first of all, good commands must be taken
            self.kind, names = "plain", [names[number]]
        elif self.kind == "resume":
            names = ["resume", "resume", "resume_classifier"]
        elif self.kind == "secret":
            names = list(PUSHING)
        elif self.kind == "damage":
            names = [name for name in names if BASES[name].reads and not name.startswith("resume")]
        elif self.kind == "signal":
            names = [name for name in names if BASES[name].writes]
        self.name = self.rng.choice(names)
        self.base = BASES[self.name]
        self.top = work / str(number)
        self.folder = self.top / "above" / "case"
        self.damaged = ""
        self.ended: Ended | None = None

    def run(self) -> dict:
        """Run the case; return its line of cases.jsonl."""
        shutil.rmtree(self.top, ignore_errors=True)
        make_folder(self.root, self.folder, self.base.needs)
        command = self._draw()
        before = snapshot(self.folder)
        limits = self._limits(command)
        self.ended = run_child(self.folder, self.name, command.argv, limits)
        outcome, remark = self._judge(command, before, limits)
        own = self.ended.err.strip().splitlines()
        return {
            "case": self.number,
            "kind": self.kind,
            "base": self.name,
            "script": self.base.script,
            "command": command.argv,
            "damage": command.change,
            "outcome": outcome,
            "good": outcome in GOOD,
            "remark": remark[:500],
            "seconds": round(self.ended.seconds, 2),
            "last_line": own[-1][-500:] if own else "",
        }

    def _draw(self) -> Draw:
        rng, folder = self.rng, self.folder
        if self.kind == "command":
            prepare(folder)
            return draw_command(self.base, rng)
        if self.kind == "yaml":
            return draw_yaml(self.base, rng, folder)
        if self.kind == "secret":
            return draw_secret(self.base, rng, folder)
        argv, words = self.base.argv, ""
        if self.kind in ("damage", "resume"):
            path = rng.choice([path for path in sorted(folder.glob(rng.choice(self.base.reads))) if path.is_file()])
            self.damaged = str(path.relative_to(folder))
            words = f"{self.damaged}: {damage(path, rng)}"
            if "dataloader_num_workers" in fields_of(self.base.script) and rng.random() < 0.25:
                argv += ["--dataloader_num_workers", "1"]
        return Draw(argv, words)

    def _limits(self, command: Draw) -> Limits:
        seconds = min(LONG_RUN_SECONDS, self.seconds) if command.may_run_on else self.seconds
        if self.kind == "full disk":
            return Limits(self.seconds, file_bytes=int(10 ** self.rng.uniform(1, 6)))
        if self.kind == "signal":
            number = self.rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
            after = self.rng.uniform(0.1, 1) * self._good()["seconds"]
            return Limits(self.seconds, signal=number, signal_after=after)
        return Limits(seconds, environment=command.environment)

    def _judge(self, command: Draw, before: dict[str, str], limits: Limits) -> tuple[str, str]:
        ended = self.ended
        outcome, remark = judge(ended)
        leak = holds_token(self.folder, ended, ("drawn.yaml",))
        if leak:
            return "leak", leak
        if any(self.top.rglob("pwned*")):
            return "code ran", "pwned"
        if limits.signal is not None:
            return self._judge_signal(command, limits.signal, outcome, remark, before)
        if outcome == "hang" and command.may_run_on:
            return "long run", ""
        if outcome not in ("ok", "refused"):
            return outcome, remark
        if outcome == "ok" and command.must_fail:
            return "wrong acceptance", command.change
        problem = half_written(self.folder, before, self.base.writes)
        if problem and self.kind in ("command", "yaml") and outcome == "ok" and " was " in problem:
            problem = None  # it was told to write elsewhere
        if problem:
            return ("wrong acceptance" if "not finite" in problem else "half-written"), f"{problem} ({outcome})"
        if outcome == "ok" and self.kind in ("damage", "resume", "full disk", "plain"):
            return self._compare(command)
        if outcome == "refused" and self.kind == "plain":
            return "refused good input", remark
        return outcome, remark

    def _compare(self, command: Draw) -> tuple[str, str]:
        """Compare the results with those of the good files."""
        good, found = self._good()["results"], results_of(self.folder, self.base.writes, self.ended.out)
        name = Path(self.damaged).name
        is_content = name.endswith(CONTENT) and name not in OURS and not command.change.endswith(NONSENSE)
        is_content = is_content or self.damaged.startswith("vae/") or "checksums deleted" in command.change
        for key, value in good.items():
            if self.damaged and key.startswith(self.damaged):
                continue
            if key not in found and not is_content:
                return "half-written", f"no {key}"
            if found.get(key) != value and not is_content:
                return "wrong acceptance", f"{key} differs"
        for key, value in found.items():
            if value in ("nan", "inf", "-inf"):
                return "wrong acceptance", f"{key} is {value}"
        return "ok", ""

    def _judge_signal(self, command: Draw, number: int, outcome: str, remark: str, before: dict) -> tuple[str, str]:
        """After a signal the process ends tidily, and the same command completes."""
        first = self.ended
        if first.timed_out:
            return "hang", f"after signal {number}"
        # Python prints a Ctrl-C that comes in one of its own callbacks, and goes on.
        ignored = number == signal.SIGINT and first.err.count("Traceback") == first.err.count("Exception ignored in")
        if outcome == "traceback" and not ignored:
            return "traceback", f"signal {number}: {remark}"
        # A library that Ctrl-C interrupts in its imports reports an error of its own, in one line.
        if first.code not in (0, -number, 128 + number) and outcome != "refused":
            return "odd exit code", f"signal {number}: {first.code}: {remark}"
        if number != signal.SIGKILL:
            problem = half_written(self.folder, before, self.base.writes, partial_ok=number == signal.SIGTERM)
            if problem:
                return "half-written", f"signal {number}: {problem}"
        if first.code == 0:
            return "ok", ""
        self.ended = run_child(self.folder, self.name, self.base.argv, Limits(self.seconds))
        outcome, remark = judge(self.ended)
        # All but the last words, or the picture beside the numbers, was done already.
        done = outcome == "refused" and "exists already" in remark
        if done or (outcome == "refused" and self._compare(command)[0] == "ok"):
            return "stopped", ""
        if outcome != "ok":
            return ("does not resume" if outcome == "refused" else outcome), f"again after signal {number}: {remark}"
        problem = half_written(self.folder, before, self.base.writes)
        if problem:
            return "half-written", f"again after signal {number}: {problem}"
        outcome, remark = self._compare(command)
        return ("stopped" if outcome == "ok" else outcome), remark

    def _good(self) -> dict:
        """Return the results of the unchanged command, which the first case that asks for them makes."""
        path = self.root / "good" / f"{self.name}.json"
        if not path.is_file():
            folder = self.work / f"{self.name}.{os.getpid()}" / "case"
            make_folder(self.root, folder, self.base.needs)
            ended = run_child(folder, self.name, self.base.argv, Limits(self.seconds))
            assert ended.code == 0, f"{self.name} must complete:\n{ended.err[-2000:]}"
            found = {"seconds": ended.seconds, "results": results_of(folder, self.base.writes, ended.out)}
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(found))
            partial.replace(path)
            shutil.rmtree(folder.parent)
        return json.loads(path.read_text())


def make_folder(root: Path, folder: Path, needs: tuple[str, ...]) -> None:
    """Copy the good files that a command needs to a new folder."""
    folder.mkdir(parents=True)
    for name in needs:
        path = root / "template" / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / name)
