import os
import shutil

import pytest
from datasets import Value, load_from_disk

from sdt_diffusion.utils.fingerprint import fingerprint_files
from tests.data.test_images import table


@pytest.fixture
def folder(tmp_path):
    for name in ("ant/0.png", "ant/1.png", "bee/0.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"123")
    return tmp_path / "images"


def test_a_copied_folder_keeps_its_fingerprint(folder, tmp_path):
    before = fingerprint_files(str(folder))
    assert len(before) == 16
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / "ant" / "0.png", (1, 1))
    (tmp_path / "copy" / ".DS_Store").write_text("")
    assert fingerprint_files(str(tmp_path / "copy")) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "ant" / "1.png").write_bytes(b"1234"),
        lambda folder: (folder / "ant" / "1.png").unlink(),
        lambda folder: (folder / "ant" / "2.png").write_bytes(b"123"),
        lambda folder: (folder / "ant" / "1.png").rename(folder / "bee" / "1.png"),
    ],
)
def test_a_changed_folder_has_another_fingerprint(folder, change):
    before = fingerprint_files(str(folder))
    change(folder)
    assert fingerprint_files(str(folder)) != before


def test_files_count_by_name_and_size_and_their_neighbors_do_not_count(tmp_path):
    for name in ("x-0.tar", "x-1.tar", "y.tar"):
        (tmp_path / name).write_bytes(b"123")
    names = ("x-0.tar", "x-1.tar", "x-*.tar")
    before = [fingerprint_files(str(tmp_path / name)) for name in names]
    assert len({*before}) == 3
    (tmp_path / "y.tar").write_bytes(b"1234")
    assert [fingerprint_files(str(tmp_path / name)) for name in names] == before
    (tmp_path / "x-1.tar").write_bytes(b"1234")
    after = [fingerprint_files(str(tmp_path / name)) for name in names]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, False]


def test_files_that_datasets_caches_beside_a_data_set_do_not_count(tmp_path):
    table(["ant", "bee"], label=Value("string")).save_to_disk(tmp_path / "saved")
    before = fingerprint_files(str(tmp_path / "saved"))
    load_from_disk(str(tmp_path / "saved")).class_encode_column("label")
    assert list((tmp_path / "saved").glob("cache-*"))
    assert fingerprint_files(str(tmp_path / "saved")) == before


@pytest.mark.parametrize("dataset", ["digits", "owner/a-name-on-the-hub"])
def test_a_data_set_that_is_not_on_disk_has_no_fingerprint(dataset):
    assert fingerprint_files(dataset) is None
