import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sdt_diffusion.utils import files
from sdt_diffusion.utils.files import (
    FolderLock,
    check_new,
    check_temporary_folder,
    check_writable,
    move_into,
    require_space,
    shorten_path,
    write_atomically,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "curve.png"
    write_atomically(path, lambda p: p.write_text("old"))

    def half(partial):
        assert partial.suffix == ".png"
        partial.write_text("ne")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["curve.png"]


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / ".result.partial.json").symlink_to(victim)
    write_json(tmp_path / "result.json", {"a": 1})
    assert victim.read_text() == "untouched"
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}
    (tmp_path / ".result.partial.json").mkdir()
    with pytest.raises(OSError, match=r"result\.partial\.json"):
        write_json(tmp_path / "result.json", {"a": 2})
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}


def test_json_is_valid_everywhere(tmp_path):
    write_json(tmp_path / "result.json", {"a": math.nan, "b": [1.5, -math.inf, (2, "nan")], "c": True})
    values = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert values == {"a": None, "b": [1.5, None, [2, "nan"]], "c": True}


def test_workers_need_a_short_path_for_their_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: "/tmp/" + "a" * 70)
    check_temporary_folder(0)
    with pytest.raises(ValueError, match="has too long a path for workers: set TMPDIR"):
        check_temporary_folder(1)


def test_work_whose_results_do_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    require_space(tmp_path / "new" / "folder", 0.9e9, "Five checkpoints")
    with pytest.raises(OSError, match=r"Five checkpoints will take about 2\.5 GB, and 1 GB are free.*new/folder"):
        require_space(tmp_path / "new" / "folder", 2.5e9, "Five checkpoints")


def test_a_full_disk_says_which_file_it_was(tmp_path):
    def full(partial):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*curve.png'"):
        write_atomically(tmp_path / "curve.png", full)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("Error while serializing: InvalidTensorView", errno.EIO),
    ],
)
def test_errors_of_safetensors_name_the_file(tmp_path, text, number):
    def full(partial):
        partial.write_text("half")
        raise SafetensorError(text)

    with pytest.raises(OSError, match=r"Error while serializing.*: '.*shard\.safetensors'") as caught:
        write_atomically(tmp_path / "shard.safetensors", full)
    assert caught.value.errno == number
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused_early(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="No file can be written there"):
        check_writable(tmp_path / "file")


def test_an_existing_file_is_not_written_again(tmp_path):
    check_new(tmp_path / "curve.png", ".png")
    (tmp_path / "curve.png").write_text("precious")
    with pytest.raises(ValueError, match=r"curve\.png exists already; give another name, or delete it"):
        check_new(tmp_path / "curve.png", ".png")
    with pytest.raises(ValueError, match=r"curve\.gif must end in \.png or \.jpg"):
        check_new(tmp_path / "curve.gif", ".png", ".jpg")


def test_a_full_disk_leaves_a_folder_as_it_was(tmp_path):
    (tmp_path / "model").write_text("old")

    def save(folder):
        (folder / "model").write_text("new")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as caught:
        move_into(tmp_path, save)
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_moving_into_a_folder_replaces_only_what_is_new(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "old").write_text("")
    (tmp_path / "kept").write_text("")

    def save_pipeline(folder):
        (folder / "transformer").mkdir()
        (folder / "transformer" / "new").write_text("")
        (folder / "model_index.json").write_text("{}")

    def full(folder):
        save_pipeline(folder)
        raise OSError("No space left on device")

    move_into(tmp_path, save_pipeline)
    assert names(tmp_path) == ["kept", "model_index.json", "transformer"]
    assert names(tmp_path / "transformer") == ["new"]
    with pytest.raises(OSError, match="No space"):
        move_into(tmp_path, full)
    assert names(tmp_path) == ["kept", "model_index.json", "transformer"]


@pytest.fixture
def start(tmp_path):
    """Start a process that locks the folder, and says so."""
    started = []

    def run(*, then):
        program = f"import os, time\nfrom files import FolderLock\nFolderLock(FOLDER).acquire()\n{then}"
        program = program.replace("FOLDER", f"__import__('pathlib').Path({str(tmp_path)!r})")
        command = [sys.executable, "-c", program]
        process = subprocess.Popen(command, cwd=Path(files.__file__).parent, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_lock_keeps_other_processes_out_until_their_end(start, tmp_path):
    other = start(then="print('locked', flush=True); time.sleep(60)")
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"Another process is writing to {tmp_path}: wait until it is done"):
        FolderLock(tmp_path).acquire()
    other.kill()
    other.wait()
    with FolderLock(tmp_path):
        assert names(tmp_path) == [".lock"]
        assert start(then="print('locked')").wait() == 1
    assert names(tmp_path) == []
    assert start(then="print('locked')").wait() == 0


def test_a_worker_that_outlives_a_killed_process_does_not_hold_its_lock(start, tmp_path):
    other = start(then="worker = os.fork()\nif worker: print(worker, flush=True)\ntime.sleep(60)")
    worker = int(other.stdout.readline())
    try:
        other.kill()
        other.wait()
        os.kill(worker, 0)  # it lives
        with FolderLock(tmp_path):
            pass
    finally:
        os.kill(worker, 9)


def test_a_lock_file_that_was_deleted_in_between_is_made_again(tmp_path, monkeypatch):
    lockf, calls = files.fcntl.lockf, []

    def released_in_between(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        lockf(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "lockf", released_in_between)
    with FolderLock(tmp_path):
        assert len(calls) == 2
        assert names(tmp_path) == [".lock"]


@pytest.mark.parametrize("missing", ["module", "support"])
def test_nothing_is_locked_where_there_are_no_locks(tmp_path, monkeypatch, missing):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "module":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "lockf", unsupported)
    with FolderLock(tmp_path):
        pass
    assert names(tmp_path) == []


def test_recorded_paths_hide_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    work, home = Path.cwd(), Path.home()
    for path, short in (
        (f"{work}/runs/a", "runs/a"),
        (str(work), "."),
        (f"{home}/data", "~/data"),
        (str(home), "~"),
        (f"{home}er/data", ".../data"),
        ("/data/images/*.tar", ".../*.tar"),
        ("/data/my images (train)", ".../my images (train)"),
        ("runs/a", "runs/a"),
        ("owner/name", "owner/name"),
        (f'{{"file": "{work}/a"}}', '{"file": "a"}'),
        (["/data/a", f"{home}/b", 3], [".../a", "~/b", 3]),
        (None, None),
        (1.5, 1.5),
    ):
        assert shorten_path(path) == short
    assert shorten_path(f"{home}/data", home="HOME:") == "HOME:data"
    monkeypatch.setenv("HOME", "/")
    assert shorten_path("/data/a") == ".../a"
