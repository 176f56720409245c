import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from sdt_diffusion.experiments import runner
from sdt_diffusion.experiments.result_files import read_results, result_path, write_result
from sdt_diffusion.experiments.runner import Runner, RunnerArguments
from sdt_diffusion.training.distributed import Interrupted
from sdt_diffusion.utils.files import LOCK_FILE
from tests.experiments.studies import build_study, record_of, write_study

#: In place of the process of a cell: notes that it began, and does as `what` says.
STAND_IN = """
    import json, os, sys, time
    job = json.load(open(sys.argv[1]))
    name = f"{job['result']['variant']}-seed{job['result']['seed']}"
    open("began.txt", "a").write(name + "\\n")
    what = json.load(open("what.json")).get(name, "finish")
    if what == "crash":
        sys.exit("a bug")
    if what == "die":
        os.kill(os.getpid(), 9)
    if what == "wait":
        time.sleep(60)
    if what == "pause":
        time.sleep(0.3)
    failed = "the loss is not finite" if what == "fail" else None
    template = json.load(open("template.json"))
    keys = ("versions", "commit", "cpu") if failed else template
    record = {**{key: template[key] for key in keys}, **job["result"], "seconds": 1.0, "failed": failed}
    os.makedirs(os.path.dirname(job["output"]), exist_ok=True)
    open(job["output"], "w").write(json.dumps(record))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The small study in the working directory, without samples, whose cells are stand-ins."""
    monkeypatch.chdir(tmp_path)
    study = build_study(tmp_path, evaluation=None)
    (tmp_path / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
    (tmp_path / "template.json").write_text(json.dumps(record_of(study.cells()[0])))
    monkeypatch.setattr(runner, "COMMAND", [sys.executable, "-S", str(tmp_path / "stand_in.py")])
    monkeypatch.setattr(runner, "INTERVAL", 0.02)
    do()
    return study


def do(**what):
    """Say what the processes of cells do, by the cells' names with an underscore: finish by default."""
    Path("what.json").write_text(json.dumps({name.replace("_", "-"): value for name, value in what.items()}))


def run(study, **options):
    return Runner(study, RunnerArguments(study=Path("small.yaml"), **options)).run()


def began():
    path = Path("began.txt")
    names = path.read_text().split() if path.is_file() else []
    path.unlink(missing_ok=True)
    return names


class TestRunner:
    def test_every_cell_runs_once_and_is_reported_with_the_time_left(self, study, capsys):
        assert run(study, processes_side_by_side=1) == 0
        assert began() == ["none-seed0", "context-seed0", "none-seed1", "context-seed1"]
        assert len(read_results(Path("experiments/results"), study)) == 4
        assert run(study) == 0
        assert began() == []
        said = capsys.readouterr()
        assert "4 cells, 0 done, 1 at a time" in said.out
        assert "none-seed0: held-out loss 0.5, FD 3 (1 s); 3 cell(s) left" in said.out + said.err
        assert "4 cells, 4 done" in said.out

    def test_several_run_side_by_side(self, study):
        do(none_seed0="pause", context_seed0="pause", none_seed1="pause", context_seed1="pause")
        started = time.monotonic()
        assert run(study, processes_side_by_side=4) == 0
        assert time.monotonic() - started < 4 * 0.3 + 2
        assert len(began()) == 4

    def test_a_part_of_the_cells_can_be_run(self, study):
        run(study, variants=["context"], seeds=[1])
        assert began() == ["context-seed1"]
        with pytest.raises(ValueError, match="seeds: 5 is not in the study, which has 0, 1"):
            run(study, seeds=[5])

    def test_a_failure_is_kept_listed_and_run_anew_only_if_asked_for(self, study, capsys):
        do(context_seed0="fail")
        assert run(study) == 1
        assert "context-seed0 FAILED: the loss is not finite" in "".join(capsys.readouterr())
        began()
        assert run(study) == 1
        assert began() == []
        do()
        assert run(study, retry_failed=True) == 0
        assert began() == ["context-seed0"]

    def test_a_process_that_crashes_leaves_a_result_that_says_so(self, study):
        do(none_seed0="crash")
        assert run(study) == 1
        record = read_results(Path("experiments/results"), study)["none", 0]
        assert record["failed"] == "a bug"
        assert record["commit"]

    def test_one_that_is_killed_has_no_result_and_goes_on_with_the_next_command(self, study, capsys):
        do(none_seed0="die")
        assert run(study) == 1
        assert "none-seed0: ended by a signal" in "".join(capsys.readouterr())
        began()
        do()
        assert run(study) == 0
        assert began() == ["none-seed0"]

    @pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
    def test_a_signal_ends_the_processes_and_the_same_command_goes_on(self, study, capsys, number, reason):
        do(none_seed0="finish", context_seed0="wait", none_seed1="wait")

        def interrupt():
            while not Path("began.txt").is_file() or len(Path("began.txt").read_text().split()) < 3:
                time.sleep(0.02)
            os.kill(os.getpid(), number)

        threading.Thread(target=interrupt).start()
        with pytest.raises(Interrupted) as ended:
            run(study, processes_side_by_side=2)
        assert ended.value.code == 128 + number
        assert f"Stopped by {reason}. The same command goes on." in capsys.readouterr().out
        assert sorted(began()) == ["context-seed0", "none-seed0", "none-seed1"]
        do()
        assert run(study) == 0
        assert sorted(began()) == ["context-seed0", "context-seed1", "none-seed1"]

    def test_results_of_other_arguments_are_refused_with_the_file_and_the_argument(self, study):
        run(study)
        other = build_study(Path.cwd(), evaluation={"samples": 99})
        with pytest.raises(ValueError, match=r"none-seed0\.json is of another cell .*evaluation\.samples: 2000"):
            run(other)

    def test_a_damaged_result_is_refused(self, study):
        cell = study.cells()[0]
        write_result(result_path(Path("experiments/results"), cell), record_of(cell, cpu=3))
        with pytest.raises(ValueError, match=r"none-seed0\.json is damaged: cpu is 3"):
            run(study)

    def test_two_runners_do_not_share_a_study(self, study):
        folder = Path("outputs/experiments") / study.name
        folder.mkdir(parents=True)
        script = (
            "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(1, flush=True)"
        )
        command = [sys.executable, "-S", "-c", f"{script}; sys.stdin.read()", str(folder / LOCK_FILE)]
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        other.stdout.readline()
        with pytest.raises(ValueError, match="Another process is writing to"):
            run(study)
        other.communicate()

    def test_a_placeholder_without_a_folder_is_refused_before_a_cell_runs(self, study):
        with pytest.raises(ValueError, match=r"needs a folder for \{data\}"):
            run(build_study(Path.cwd(), evaluation={"reference": "{data}"}))
        assert began() == []


def test_the_script_takes_the_study_as_its_first_word(study, capsys):
    write_study(Path.cwd(), evaluation=None)
    runner.main(["small.yaml", "--variants", "none", "--seeds", "0"])
    assert "small: 1 cells, 0 done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"Error: .*other\.yaml"):
        runner.main(["other.yaml"])
