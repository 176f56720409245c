import pytest
from PIL import Image

from sdt_diffusion.data.images import check_class_folders


@pytest.mark.parametrize("split", [".", "val"])
def test_empty_class_folders_are_named(tmp_path, split):
    for name in ("cat", "dog", "elk/old"):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("L", (2, 2)).save(tmp_path / split / name / "a.png")
    (tmp_path / split / ".cache").mkdir()
    check_class_folders(tmp_path, ["cat", "dog", "old"])
    (tmp_path / split / "bee").mkdir()
    (tmp_path / split / "bee" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"^1 class folder\(s\) without an image: .*bee'\. Fill or remove them\.$"):
        check_class_folders(tmp_path, ["cat", "dog", "old"])
    check_class_folders(tmp_path, ["ant"])  # classes that are not folders


def test_links_to_class_folders_hold_what_they_lead_to(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2)).save(tmp_path / name / "a.png")
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(tmp_path / name)
    check_class_folders(tmp_path / "set", ["cat", "dog"])


def test_many_are_counted(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "cat" / "a.png")
    for i in range(30):
        (tmp_path / f"{i}").mkdir()
    with pytest.raises(ValueError, match=r"^30 class folder.* and 10 more"):
        check_class_folders(tmp_path, ["cat"])
