"""Files and folders that others have damaged, linked or prepared."""

import io
import os
import tarfile

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader

from sdt_diffusion.data import CorruptImageError, DataArguments, LabeledImages, ShuffledStream, decoding, load_images
from sdt_diffusion.data.decoding import ImageDecoder, center_crop, check_class_folders, walk_folders
from sdt_diffusion.data.latents.rows import open_rows
from sdt_diffusion.data.latents.training_data import open_training_data
from sdt_diffusion.data.raw_images import (
    FolderImages,
    RawImageArguments,
    SubsetImages,
    open_images,
    refuse_preparation,
)
from sdt_diffusion.data.splits import ValidationDataArguments, load_splits, stratified_split
from sdt_diffusion.utils.arguments import one_line
from tests.data.test_images import picture, png_bytes, table


def save_picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path)


def load(path, **changes):
    return load_images(DataArguments(dataset=str(path), **changes), default_resolution=8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of two pictures."""
    for seed, name in enumerate(("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")):
        save_picture(tmp_path / "images" / name, seed)
    return tmp_path / "images"


class TestFolders:
    def test_classes_may_be_links_to_other_disks(self, folder, tmp_path):
        (tmp_path / "disk").mkdir()
        (folder / "cat").rename(tmp_path / "disk" / "n01 [old]")
        (folder / "cat").symlink_to(tmp_path / "disk" / "n01 [old]")
        images = load(folder)
        assert images.class_names == ["cat", "dog"]
        assert images.labels.tolist() == [0, 0, 1, 1]
        assert images[1][0].shape == (3, 8, 8)

    def test_splits_may_be_links_too(self, folder, tmp_path):
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "train").symlink_to(folder)
        (tmp_path / "linked" / "val").symlink_to(folder)
        save_picture(tmp_path / "linked" / "extra" / "elk" / "0.png")
        for split in ("train", "validation"):
            assert load(tmp_path / "linked", dataset_split=split).class_names == ["cat", "dog"]

    @pytest.mark.parametrize("place", [".", "cat"])
    def test_a_link_to_a_folder_above_is_refused_by_name(self, folder, place):
        (folder / place / "loop").symlink_to(folder)
        for read in (load, lambda path: check_class_folders(path, ["cat", "dog"])):
            with pytest.raises(ValueError, match=r"loop is a link to a folder above it"):
                read(folder)

    def test_images_without_conversion_are_counted_once_in_a_loop(self, folder):
        (folder / "cat" / "loop").symlink_to(folder)
        assert len(FolderImages(folder)) == 4

    def test_links_that_multiply_are_bounded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(decoding, "MAX_FOLDERS", 1000)
        for level in range(20):  # a million paths
            (tmp_path / f"{level}").mkdir()
            for name in "ab":
                (tmp_path / f"{level}" / name).symlink_to(tmp_path / f"{level + 1}")
        with pytest.raises(ValueError, match=r"has more than 1,000 folders below it"):
            list(walk_folders(tmp_path))

    def test_pipes_among_the_images_are_left_out(self, folder):
        for name in ("cat/2.png", "metadata.csv", "dog/metadata.jsonl"):
            os.mkfifo(folder / name)
        assert len(load(folder)) == len(FolderImages(folder)) == 4

    @pytest.mark.parametrize("name", ["pipe", "pipe.parquet", "pipe.tar", "pipe.npz"])
    def test_a_pipe_is_no_data_set(self, tmp_path, name):
        os.mkfifo(tmp_path / name)
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{name}"):
            open_images(str(tmp_path / name), RawImageArguments())
        with pytest.raises(ValueError, match=rf"{name} is not a file|only \.parquet"):
            load(tmp_path / name)

    def test_a_pipe_among_the_files_of_a_saved_data_set_is_named(self, tmp_path):
        table([0, 1]).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "state.json").unlink()
        os.mkfifo(tmp_path / "saved" / "state.json")
        with pytest.raises(ValueError, match=r"state\.json is not a file"):
            load(tmp_path / "saved")

    def test_a_pipe_that_a_table_names_is_not_opened(self, tmp_path):
        os.mkfifo(tmp_path / "x.png")
        with pytest.raises(CorruptImageError, match=r"row 3 \(.*x\.png\) of table: it is not a file"):
            ImageDecoder(8, "RGB")({"bytes": None, "path": str(tmp_path / "x.png")}, 3, "table")

    @pytest.mark.parametrize("name", ["", "~nobody_of_this_name/images", "x" * 5000, "a\0b", "[", "**"])
    def test_names_that_are_no_paths(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises((ValueError, OSError)):
            load(name)


class TestDigits:
    """The word means scikit-learn's, unless there is something else of that name."""

    OPENERS = (
        lambda name: open_images(name, RawImageArguments()),
        lambda name: load_images(DataArguments(dataset=name), 8),
        lambda name: open_training_data(DataArguments(dataset=name), None, 8, 0),
        lambda name: open_rows(DataArguments(dataset=name), True, 8),
        lambda name: load_splits(DataArguments(dataset=name), ValidationDataArguments(), 8),
    )

    @pytest.mark.parametrize("read", OPENERS)
    def test_a_folder_of_that_name_is_neither_taken_nor_passed_over(self, tmp_path, monkeypatch, read):
        save_picture(tmp_path / "digits" / "0" / "a.png")
        save_picture(tmp_path / "digits" / "1" / "a.png")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"'digits' means .* but .*/digits exists too: write \./digits for it"):
            read("digits")

    def test_its_path_means_the_folder_and_without_it_the_word_means_the_digits(self, tmp_path, monkeypatch):
        save_picture(tmp_path / "digits" / "0" / "a.png")
        save_picture(tmp_path / "digits" / "1" / "a.png")
        monkeypatch.chdir(tmp_path)
        assert len(open_images("./digits", RawImageArguments())) == len(load("./digits")) == 2
        (tmp_path / "digits").rename(tmp_path / "other")
        assert len(open_images("digits", RawImageArguments())) == len(load("digits")) == 1797


class TestImages:
    def test_a_line_of_pixels_is_refused_before_it_is_resized(self, tmp_path):
        Image.new("L", (65_000, 1)).save(tmp_path / "line.png")
        message = r"line\.png.*it has 65000x1 pixels, and would have 16640000x256 when its short side is resized"
        image = {"bytes": None, "path": str(tmp_path / "line.png")}
        with pytest.raises(CorruptImageError, match=message):
            ImageDecoder(256, "RGB")(image, 0, "x")
        with pytest.raises(CorruptImageError, match=message):
            ImageDecoder(256, "RGB", as_pictures=True)(image, 0, "x")
        with pytest.raises(CorruptImageError, match=message):
            FolderImages(tmp_path, "RGB", 256)
        with pytest.raises(CorruptImageError, match="short side is resized to 512"):
            ImageDecoder(None, "RGB", as_pictures=True)(image, 0, "x")
        assert center_crop(Image.new("L", (1000, 1)), 256).size == (256, 256)

    def test_a_decompression_bomb_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.new("L", (20, 20)).save(tmp_path / "bomb.png")
        with pytest.raises(CorruptImageError, match=r"bomb\.png.*400 pixels.*exceeds limit"):
            ImageDecoder(8, "RGB")({"bytes": None, "path": str(tmp_path / "bomb.png")}, 0, "x")

    def test_a_full_memory_is_not_taken_for_a_damaged_image(self, monkeypatch):
        def full(*_):
            raise MemoryError

        monkeypatch.setattr(decoding.Image, "open", full)
        with pytest.raises(MemoryError):
            ImageDecoder(8, "RGB")({"bytes": b"x", "path": None}, 0, "x")

    def test_a_worker_names_the_file_in_its_own_message(self, folder):
        (folder / "dog" / "1.png").write_bytes(b"no picture")
        stream = ShuffledStream(load(folder), 0, None, start=0, stop=4)
        with pytest.raises(CorruptImageError) as caught:
            list(DataLoader(stream, batch_size=4, num_workers=1))
        path = folder / "dog" / "1.png"
        assert one_line(caught.value) == (
            f"Cannot read the image of row 3 ({path}) of {folder}: Pillow does not know its format"
        )

    def test_rows_without_images_are_named(self, tmp_path):
        rows = {"img": [{"bytes": png_bytes(picture(0)), "path": None}, None]}
        Dataset.from_dict(rows, features=Features({"img": ImageFeature()})).to_parquet(tmp_path / "x.parquet")
        images = open_images(str(tmp_path / "x.parquet"), RawImageArguments())
        with pytest.raises(CorruptImageError, match=r"Cannot use row 1 of .*x\.parquet: the row has no image"):
            images[1]


class TestTables:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("label", [10**9, 2**62])
    def test_numbers_of_images_are_no_labels(self, tmp_path, label, streaming):
        table([0, label]).to_parquet(tmp_path / "x.parquet")
        arguments = DataArguments(dataset=str(tmp_path / "x.parquet"))
        with pytest.raises(ValueError, match=r"column 'label' (has .* classes, more than 100,000|is not a label)"):
            list(open_rows(arguments, streaming, 8).read(lambda row: True))

    @pytest.mark.parametrize(
        ("feature", "labels", "message"),
        [
            (List(Value("int64")), [[0], [1]], "column 'label' holds List.*, which are not labels"),
            ({"a": Value("int64")}, [{"a": 0}], "column 'label' holds {'a'.*, which are not labels"),
            (Value("bool"), [True], "row 0: True in column 'label' is not a label"),
        ],
    )
    def test_labels_of_other_kinds(self, tmp_path, feature, labels, message):
        table(labels, label=feature).to_parquet(tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "x.parquet")

    def test_images_are_not_read_as_labels(self, folder):
        with pytest.raises(ValueError, match=r"column 'image' holds Image.*, which are not labels"):
            load(folder, label_column="image")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_column_that_holds_no_images(self, tmp_path, streaming):
        table([0, 1]).to_parquet(tmp_path / "x.parquet")
        arguments = DataArguments(dataset=str(tmp_path / "x.parquet"), image_column="label")
        with pytest.raises(ValueError, match=r"x\.parquet: column 'label' holds no images|row 0 cannot be read"):
            list(open_rows(arguments, streaming, 8).read(lambda row: True))

    def test_an_empty_table(self, tmp_path):
        table([]).to_parquet(tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=r"x\.parquet.*"):
            load(tmp_path / "x.parquet")

    def test_rows_that_can_no_longer_be_read_are_named(self, tmp_path, monkeypatch):
        table([0, 1]).to_parquet(tmp_path / "x.parquet")
        images = load(tmp_path / "x.parquet")

        def damaged(*_):
            raise RuntimeError("offsets")

        monkeypatch.setattr(type(images.dataset), "__getitem__", damaged)
        with pytest.raises(ValueError, match=r"Cannot read rows 0, 1 of .*x\.parquet: offsets"):
            images.__getitems__([0, 1])

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"\0" * 2000, bytes(range(256)) * 8])
    @pytest.mark.parametrize("ending", ["parquet", "arrow", "tar"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_damaged_files(self, tmp_path, content, ending, streaming):
        path = tmp_path / f"x.{ending}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.{ending}"):
            list(open_rows(DataArguments(dataset=str(path)), streaming, 8).read(lambda row: True))

    def test_odd_members_of_a_tar_are_left_out(self, tmp_path):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for number in range(3):
                for ending, data in (("png", png_bytes(picture(number))), ("cls", str(number).encode())):
                    entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
            for name, kind in (("up.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)):
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = kind, "/etc/passwd"
                archive.addfile(entry)
        assert load(tmp_path / "x.tar").labels.tolist() == [0, 1, 2]

    def test_a_tar_whose_member_is_said_to_be_huge(self, tmp_path):
        entry = tarfile.TarInfo("0000.png")
        entry.size = 1 << 40
        (tmp_path / "x.tar").write_bytes(entry.tobuf() + b"\0" * 512)
        with pytest.raises(ValueError, match=r"x\.tar"):
            load(tmp_path / "x.tar")


class TestNumbers:
    @pytest.mark.parametrize("resolution", [0, -1, 10**9, 2.5, float("nan")])
    def test_resolutions(self, tmp_path, resolution):
        save_picture(tmp_path / "a.png")
        for make in (
            lambda: DataArguments(resolution=resolution),
            lambda: RawImageArguments(resolution=resolution),
            lambda: ImageDecoder(resolution, "RGB"),
            lambda: FolderImages(tmp_path, "RGB", resolution),
        ):
            with pytest.raises(ValueError, match="resolution must be"):
                make()

    @pytest.mark.parametrize("workers", [-1, 10**9, 0.5])
    def test_workers(self, workers):
        with pytest.raises(ValueError, match="dataloader_num_workers must be"):
            DataArguments(dataloader_num_workers=workers)

    @pytest.mark.parametrize("fraction", [0, 1, -1, float("nan"), float("inf")])
    def test_fractions(self, fraction):
        with pytest.raises(ValueError, match="fraction must be"):
            stratified_split(np.zeros(10, int), fraction)
        with pytest.raises(ValueError, match="validation_fraction must be"):
            ValidationDataArguments(validation_fraction=fraction)

    @pytest.mark.parametrize(
        ("values", "name"), [((0, -1, 1), "stop"), ((-1, 4, 1), "start"), ((0, 4, 0), "num_repeats")]
    )
    def test_streams(self, values, name):
        start, stop, num_repeats = values
        with pytest.raises(ValueError, match=f"{name} must be"):
            ShuffledStream([], 0, None, start, stop, num_repeats)

    def test_subsets(self, tmp_path):
        save_picture(tmp_path / "a.png")
        with pytest.raises(ValueError, match="count must be at least 1"):
            SubsetImages(FolderImages(tmp_path), 0)


def test_gray_samples_are_read_beside_statistics(tmp_path):
    """How to read samples may be said although nothing of it has an effect on a file of statistics."""
    Image.new("L", (10, 12)).save(tmp_path / "a.png")
    args = RawImageArguments(image_mode="L", resolution=8)
    refuse_preparation(args, tmp_path / "statistics.npz", allowed=("image_mode", "resolution"))
    assert open_images(str(tmp_path), args)[0].shape == (8, 8, 1)
    with pytest.raises(ValueError, match="image_column has no effect"):
        refuse_preparation(RawImageArguments(image_column="x"), tmp_path, allowed=("image_mode", "resolution"))


def test_labels_of_a_million_names_are_still_bounded(monkeypatch):
    monkeypatch.setattr("sdt_diffusion.data.images.MAX_CLASSES", 2)
    dataset = table([0, 1, 2], label=ClassLabel(names=["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"column 'label' has 3 classes, more than 2"):
        LabeledImages(dataset, "img", "label", DataArguments(dataset="x", resolution=8))
