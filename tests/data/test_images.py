import io
import json
import struct

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from sdt_diffusion.data import CorruptImageError, DataArguments, load_images
from sdt_diffusion.data.decoding import ImageDecoder, center_crop, check_class_folders
from sdt_diffusion.data.images import FILE_FORMATS
from tests.data.test_raw_images import png_of_16_bits


def picture(seed, size=(12, 10), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes of two pictures, in subfolders."""
    for i, name in enumerate(["cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return tmp_path / "images"


def table(labels, **features):
    features = Features({"img": ImageFeature(), "label": Value("int64"), **features})
    return Dataset.from_dict(
        {"img": [{"bytes": png_bytes(picture(i)), "path": None} for i in range(len(labels))], "label": labels},
        features=features,
    )


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = load_images(DataArguments(), default_resolution=8)
    assert (len(images), images.num_classes, images.num_channels) == (1797, 10, 1)
    assert np.array_equal(images.labels, digits.target)
    pixels = torch.stack([image for image, _ in images.__getitems__(range(50))])
    expected = torch.tensor(digits.images[:50]) / 16
    assert (pixels[:, 0] / 2 + 0.5 - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert pixels.min() == -1
    assert pixels.max() == 1


def test_folder_labels_are_its_subfolders(folder):
    images = load_images(DataArguments(dataset=str(folder)), default_resolution=8)
    assert images.class_names == ["cat", "dog"]
    assert images.labels.tolist() == [0, 0, 1, 1]
    pixels, label = images[3]
    assert label == 1
    expected = np.array(center_crop(picture(3), 8)).transpose(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_files_and_saved_datasets_give_the_same(tmp_path, ending):
    dataset = table([0, 2, 1])
    path = tmp_path / f"data.{ending}"
    if ending == "parquet":
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
        on_disk = load_images(DataArguments(dataset=str(tmp_path / "saved")), default_resolution=8)
        assert on_disk.labels.tolist() == [0, 2, 1]
    images = load_images(DataArguments(dataset=str(path)), default_resolution=8)
    assert images.labels.tolist() == [0, 2, 1]
    assert images.class_names == ["0", "1", "2"]
    assert images[1][0].shape == (3, 8, 8)


@pytest.mark.parametrize("dtype", ["string", "large_string"])
def test_names_as_labels_are_numbered(tmp_path, dtype):
    features = Features({"image": ImageFeature(), "label": Value(dtype)})
    Dataset.from_dict({"image": [picture(i) for i in range(3)], "label": ["dog", "cat", "dog"]}, features).to_parquet(
        tmp_path / "x.parquet"
    )
    images = load_images(DataArguments(dataset=str(tmp_path / "x.parquet")), default_resolution=8)
    assert images.class_names == ["cat", "dog"]
    assert images.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_any_mode_becomes_the_one_asked_for(tmp_path, mode):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ending = "jpg" if mode == "CMYK" else "png"
    for name in "ab":
        picture(0, mode=mode).save(tmp_path / name / f"x.{ending}")
    for image_mode, channels in (("RGB", 3), ("L", 1)):
        images = load_images(DataArguments(dataset=str(tmp_path), image_mode=image_mode), default_resolution=8)
        assert images[0][0].shape == (channels, 8, 8)


def test_the_arguments_stay_and_the_images_carry_complete_ones(folder):
    arguments = DataArguments(dataset=str(folder), random_flip=True)
    images = load_images(arguments, default_resolution=8)
    assert arguments == DataArguments(dataset=str(folder), random_flip=True)
    assert images.arguments == DataArguments(dataset=str(folder), random_flip=True, resolution=8, image_mode="RGB")
    assert load_images(DataArguments(), default_resolution=None).arguments.image_mode == "L"
    assert images.arguments.size_and_mode == (8, "RGB")
    with pytest.raises(ValueError, match="not decided"):
        _ = arguments.size_and_mode


NAMES = {
    "names.json": json.dumps({"cat": "tabby, tabby cat", "dog": "beagle", "elk": "elk"}),
    "imagenet_class_index.json": json.dumps({"0": ["cat", "tabby, tabby cat"], "1": ["dog", "beagle"]}),
    "LOC_synset_mapping.txt": "cat tabby, tabby cat\n\ndog  beagle\nelk elk\n",
}


class TestClassNames:
    @pytest.mark.parametrize("file", NAMES)
    def test_rename_class_folders(self, folder, tmp_path, file):
        (tmp_path / file).write_text(NAMES[file])
        arguments = DataArguments(dataset=str(folder), class_names=str(tmp_path / file))
        images = load_images(arguments, default_resolution=8)
        assert images.class_names == ["tabby, tabby cat", "beagle"]
        assert images.stored_class_names == ["cat", "dog"]

    def test_rename_numbers(self, tmp_path):
        table([0, 1]).to_parquet(tmp_path / "x.parquet")
        (tmp_path / "index.json").write_text(NAMES["imagenet_class_index.json"])
        arguments = DataArguments(dataset=str(tmp_path / "x.parquet"), class_names=str(tmp_path / "index.json"))
        assert load_images(arguments, default_resolution=8).class_names == ["tabby, tabby cat", "beagle"]

    def test_classes_of_one_name_stay_apart(self, folder, tmp_path):
        (tmp_path / "names.txt").write_text("cat crane\ndog crane\n")
        arguments = DataArguments(dataset=str(folder), class_names=str(tmp_path / "names.txt"))
        assert load_images(arguments, default_resolution=8).class_names == ["crane (cat)", "crane (dog)"]

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("names.json", '{"cat": "tabby"}', r"names\.json has no name for 1 class\(es\) of .*images: 'dog'\."),
            ("names.txt", "cat tabby\ndog", r"names\.txt: line 2, 'dog', has no name"),
            ("names.json", "[1, 2]", r"names\.json is damaged: it holds a list, not a dict"),
            ("names.json", '{"cat": ["a", "b", "c"]}', r"names\.json: 'cat' has neither a name"),
            ("names.json", "{", r"names\.json is damaged: it is not valid JSON \(Expecting"),
        ],
    )
    def test_files_that_do_not_fit_are_refused(self, folder, tmp_path, file, text, message):
        (tmp_path / file).write_text(text)
        with pytest.raises(ValueError, match=f"class_names: .*{message}"):
            load_images(DataArguments(dataset=str(folder), class_names=str(tmp_path / file)), default_resolution=8)

    def test_a_missing_file_is_named(self, folder):
        with pytest.raises(FileNotFoundError, match=r"class_names: there is no file /nowhere/names\.json"):
            load_images(DataArguments(dataset=str(folder), class_names="/nowhere/names.json"), default_resolution=8)


def test_a_data_format_is_added_by_a_line(folder, tmp_path, monkeypatch):
    """By the name of a reader of `datasets`, or by a function of the files' paths."""

    def read_npz(files):
        arrays = [np.load(file) for file in files]
        labels = np.concatenate([array["labels"] for array in arrays])
        features = Features({"image": ImageFeature(), "label": ClassLabel(num_classes=int(labels.max()) + 1)})
        pictures = [pixels for array in arrays for pixels in array["images"]]
        return Dataset.from_dict({"image": pictures, "label": labels.tolist()}, features)

    monkeypatch.setitem(FILE_FORMATS, ".npz", read_npz)
    monkeypatch.setitem(FILE_FORMATS, ".pq", "parquet")
    for part in range(2):
        pixels = np.stack([np.array(picture(2 * part + i)) for i in range(2)])
        np.savez(tmp_path / f"{part}.npz", images=pixels, labels=[0, part])
    table([0, 0, 1, 1]).to_parquet(tmp_path / "x.pq")
    from_folder = load_images(DataArguments(dataset=str(folder)), default_resolution=8)
    from_npz = load_images(DataArguments(dataset=str(tmp_path / "*.npz")), default_resolution=8)
    from_parquet = load_images(DataArguments(dataset=str(tmp_path / "x.pq")), default_resolution=8)
    assert from_npz.labels.tolist() == [0, 0, 0, 1]
    assert from_parquet.labels.tolist() == from_folder.labels.tolist()
    for index in range(4):
        assert torch.equal(from_npz[index][0], from_folder[index][0])
        assert torch.equal(from_parquet[index][0], from_folder[index][0])


def test_images_of_sixteen_bits_per_pixel_are_read(tmp_path):
    """A bitmap of 5, 6 and 5 bits for red, green and blue, which Pillow reads but does not write."""
    header = struct.pack("<2sIII", b"BM", 70, 0, 66) + struct.pack("<IiiHHIIiiII", 40, 1, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    header += struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    path = tmp_path / "red.bmp"
    path.write_bytes(header + struct.pack("<HH", 0xF800, 0))
    decode = ImageDecoder(resolution=1, image_mode="RGB")
    assert decode({"bytes": None, "path": str(path)}, 0, "bitmaps").flatten().tolist() == [1, -1, -1]


class TestCenterCrop:
    def test_leaves_an_image_of_the_right_size_alone(self):
        image = picture(0, (8, 8))
        assert center_crop(image, 8) is image

    def test_takes_the_middle_of_the_long_side(self):
        pixels = np.zeros((8, 20, 3), np.uint8)
        pixels[:, 6:14] = 255
        assert np.array(center_crop(Image.fromarray(pixels), 8)).min() == 255

    @pytest.mark.parametrize("size", [(100, 37), (37, 100), (9, 8), (5, 7), (64, 64)])
    def test_gives_the_size_asked_for(self, size):
        assert center_crop(picture(0, size), 8).size == (8, 8)

    def test_halves_by_averaging(self):
        image = picture(0, (16, 16))
        halved = np.array(image).reshape(8, 2, 8, 2, 3).mean((1, 3))
        assert np.abs(np.array(center_crop(image, 8)) - halved).max() <= 1


class TestBadInput:
    def test_corrupt_file_is_named(self, folder):
        path = folder / "dog" / "a.png"
        path.write_bytes(path.read_bytes()[:60])
        images = load_images(DataArguments(dataset=str(folder)), default_resolution=8)
        images[3]
        with pytest.raises(CorruptImageError, match=r"row 2 \(.*dog/a\.png\) of .*images"):
            images[2]

    def test_corrupt_row_is_named(self, tmp_path):
        rows = [{"bytes": png_bytes(picture(0)), "path": None}, {"bytes": b"no picture", "path": None}]
        features = Features({"img": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
        Dataset.from_dict({"img": rows, "label": [0, 1]}, features).to_parquet(tmp_path / "x.parquet")
        images = load_images(DataArguments(dataset=str(tmp_path / "x.parquet")), default_resolution=8)
        with pytest.raises(CorruptImageError, match=r"row 1 of .*x\.parquet"):
            images.__getitems__([0, 1])

    @pytest.mark.parametrize("name", ["/nowhere/images", "./nowhere", "data.parquet"])
    def test_missing_paths(self, name):
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            load_images(DataArguments(dataset=name), default_resolution=8)

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match=f"Cannot read the data set {tmp_path}"):
            load_images(DataArguments(dataset=str(tmp_path)), default_resolution=8)

    def test_file_of_another_kind(self, tmp_path):
        (tmp_path / "x.csv").write_text("a,b")
        with pytest.raises(ValueError, match=r"x\.csv: only \.parquet, \.arrow, \.tar files and folders"):
            load_images(DataArguments(dataset=str(tmp_path / "x.csv")), default_resolution=8)

    def test_folder_without_subfolders_has_no_labels(self, tmp_path):
        picture(0).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"Cannot tell the label column.*names of subfolders"):
            load_images(DataArguments(dataset=str(tmp_path)), default_resolution=8)

    def test_labels_out_of_range(self, tmp_path):
        table([0, -1, 1]).to_parquet(tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=r"row 1: label -1 in column 'label' is outside 0\.\.1"):
            load_images(DataArguments(dataset=str(tmp_path / "x.parquet")), default_resolution=8)

    @pytest.mark.parametrize(("label", "dtype"), [(None, "int64"), (0.7, "float64")])
    def test_labels_that_are_not_integers(self, tmp_path, label, dtype):
        table([0, label], label=Value(dtype)).to_parquet(tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=r"row \d: .* in column 'label' is not a label"):
            load_images(DataArguments(dataset=str(tmp_path / "x.parquet")), default_resolution=8)

    def test_sixteen_bits_are_refused_rather_than_cut(self, folder):
        Image.fromarray(np.full((10, 10), 40_000, np.uint16)).save(folder / "cat" / "a.png")
        images = load_images(DataArguments(dataset=str(folder)), default_resolution=8)
        with pytest.raises(CorruptImageError, match=r"cat/a\.png.*mode I;16 has more than 8 bits per channel"):
            images[0]

    def test_sixteen_bits_of_color_are_refused_too(self, folder):
        (folder / "cat" / "a.png").write_bytes(png_of_16_bits())
        images = load_images(DataArguments(dataset=str(folder)), default_resolution=8)
        with pytest.raises(CorruptImageError, match=r"cat/a\.png.*mode RGB has more than 8 bits per channel"):
            images[0]

    def test_unknown_column(self, tmp_path):
        table([0, 1]).to_parquet(tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=r"no column 'picture' \(image_column\); it has \['img', 'label'\]"):
            load_images(
                DataArguments(dataset=str(tmp_path / "x.parquet"), image_column="picture"), default_resolution=8
            )


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


def test_links_to_class_folders_count_as_their_targets(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2)).save(tmp_path / name / "a.png")
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(tmp_path / name)
    check_class_folders(tmp_path / "set", ["cat", "dog"])


def test_many_empty_class_folders_are_counted(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "cat" / "a.png")
    for i in range(30):
        (tmp_path / f"{i}").mkdir()
    with pytest.raises(ValueError, match=r"^30 class folder.* and 10 more"):
        check_class_folders(tmp_path, ["cat"])
