import errno

import pytest

from sdt_diffusion.files import check_new, check_writable, move_into, write_atomically


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


def test_a_full_disk_says_which_file_it_was(tmp_path):
    def full(partial):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*curve.png'"):
        write_atomically(tmp_path / "curve.png", full)


def test_a_folder_that_takes_no_files_is_found_out_early(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="No file can be written there"):
        check_writable(tmp_path / "file")


def test_a_file_that_is_there_is_not_written_again(tmp_path):
    check_new(tmp_path / "curve.png", ".png")
    (tmp_path / "curve.png").write_text("precious")
    with pytest.raises(ValueError, match=r"curve\.png exists already; give another name, or delete it"):
        check_new(tmp_path / "curve.png", ".png")
    with pytest.raises(ValueError, match=r"curve\.gif must end in \.png or \.jpg"):
        check_new(tmp_path / "curve.gif", ".png", ".jpg")


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
