import io
import tarfile

import pytest
import torch
from datasets import ClassLabel, Value

from sdt_diffusion.data import CorruptImageError
from sdt_diffusion.data.decoding import ImageDecoder
from sdt_diffusion.data.images import ImageArguments
from sdt_diffusion.data.latents.rows import open_rows, shard_batches
from tests.data.test_images import picture, png_bytes, table

CLASSES = ClassLabel(names=["ant", "bee", "cat"])


def write_tar(path, numbers, labels=None):
    """A webdataset of pictures; picture 5 is none."""
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            label = (labels or {}).get(number, number % 3)
            content = b"no picture" if number == 5 else png_bytes(picture(number))
            for name, data in ((f"{number:04d}.png", content), (f"{number:04d}.cls", str(label).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def all_batches(dataset, streaming=False, wanted=lambda shard: True, num_threads=2):
    rows = open_rows(ImageArguments(dataset=str(dataset)), streaming, 8)
    assert (rows.num_rows is None) == streaming
    return rows, list(shard_batches(rows, ImageDecoder(8, "RGB"), 7, 3, wanted, num_threads))


@pytest.fixture
def parquet(tmp_path):
    table([i % 3 for i in range(17)], label=CLASSES).to_parquet(tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_keep_to_their_shard(parquet, streaming):
    rows, batches = all_batches(parquet, streaming)
    assert rows.class_names == ["ant", "bee", "cat"]
    assert rows.num_rows == 17  # a stream's are known at its end
    assert [(batch.shard, len(batch.images)) for batch in batches] == [
        *((0, 3), (0, 3), (0, 1)),
        *((1, 3), (1, 3), (1, 1)),
        (2, 3),
    ]
    assert [label for batch in batches for label in batch.labels] == [i % 3 for i in range(17)]
    decoder = ImageDecoder(8, "RGB")
    expected = [decoder({"bytes": png_bytes(picture(i)), "path": None}, i, "x") for i in range(17)]
    assert torch.equal(torch.stack([image for batch in batches for image in batch.images]), torch.stack(expected))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_batches_of_a_shard_are_the_same_without_the_others(parquet, streaming, num_threads):
    _, everything = all_batches(parquet, streaming)
    _, odd = all_batches(parquet, streaming, lambda shard: shard % 2 == 1, num_threads)
    for batch, same in zip([b for b in everything if b.shard == 1], odd, strict=True):
        assert batch.labels == same.labels
        assert torch.equal(torch.stack(batch.images), torch.stack(same.images))


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_files_by_a_pattern_or_a_folder(tmp_path, streaming):
    write_tar(tmp_path / "x-0.tar", range(4))
    write_tar(tmp_path / "x-1.tar", range(4, 9))
    for name in (tmp_path / "x-*.tar", tmp_path):
        _, batches = all_batches(name, streaming)
        images = [image for batch in batches for image in batch.images]
        assert [label for batch in batches for label in batch.labels] == [i % 3 for i in range(9)]
        assert [i for i, image in enumerate(images) if isinstance(image, CorruptImageError)] == [5]
        assert "row 5 (" in str(images[5])
        assert str(images[5]).endswith("Pillow does not know its format")


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_get_the_names_of_a_file(parquet, tmp_path, streaming):
    (tmp_path / "names.json").write_text(
        '{"0": ["ant", "weaver ant"], "1": ["bee", "bumblebee"], "2": ["cat", "tabby"]}'
    )
    write_tar(tmp_path / "x.tar", range(4))  # its labels are numbers
    for dataset in (parquet, tmp_path / "x.tar"):
        arguments = ImageArguments(dataset=str(dataset), class_names=str(tmp_path / "names.json"))
        rows = open_rows(arguments, streaming, 8)
        assert rows.class_names == ["weaver ant", "bumblebee", "tabby"]
        assert rows.arguments.resolution == 8


def test_a_stream_of_numbers_needs_names_of_numbers(tmp_path):
    write_tar(tmp_path / "x.tar", range(4))
    (tmp_path / "names.txt").write_text("ant weaver ant")
    with pytest.raises(ValueError, match=r"class_names: .*names\.txt names no numbers"):
        open_rows(ImageArguments(dataset=str(tmp_path / "x.tar"), class_names=str(tmp_path / "names.txt")), True, 8)


class TestBadInput:
    def test_strings_are_refused_as_labels_of_a_stream(self, tmp_path):
        table(["ant", "bee"], label=Value("string")).to_parquet(tmp_path / "x.parquet")
        assert open_rows(ImageArguments(dataset=str(tmp_path / "x.parquet")), False, 8).class_names == ["ant", "bee"]
        with pytest.raises(ValueError, match=r"x.parquet: the labels in column 'label' are not integers.*streaming"):
            open_rows(ImageArguments(dataset=str(tmp_path / "x.parquet")), True, 8)

    @pytest.mark.parametrize(("label", "feature"), [(-1, CLASSES), (-2, Value("int64")), (None, Value("int64"))])
    def test_invalid_labels_of_a_stream_are_refused(self, tmp_path, label, feature):
        table([0, label], label=feature).to_parquet(tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=rf"x.parquet, row 1: {label} in column 'label' is not a label"):
            all_batches(tmp_path / "x.parquet", True)

    def test_a_tar_file_that_ends_too_early(self, tmp_path):
        write_tar(tmp_path / "x.tar", range(9))
        content = (tmp_path / "x.tar").read_bytes()
        (tmp_path / "x.tar").write_bytes(content[: content.index(b"0006.png") + 700])
        with pytest.raises(ValueError, match=r"x\.tar: row 6 cannot be read"):
            all_batches(tmp_path / "x.tar", True)

    def test_an_empty_class_folder(self, tmp_path):
        for name in ("ant", "bee"):
            (tmp_path / name).mkdir()
            picture(0).save(tmp_path / name / "0.png")
        (tmp_path / "cat").mkdir()
        with pytest.raises(ValueError, match=r"1 class folder\(s\) without an image: '.*cat'"):
            all_batches(tmp_path)

    def test_a_pattern_of_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*x-\*\.tar"):
            all_batches(tmp_path / "x-*.tar", True)
