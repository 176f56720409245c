import io
import struct
import zlib

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from sdt_diffusion.data import CorruptImageError
from sdt_diffusion.data.raw_images import (
    FolderImages,
    NpzImages,
    RawImageArguments,
    SubsetImages,
    open_images,
    save_npz_images,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 10, 12, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    for name, pixels in zip(("b/1.png", "a/2.png", "a/10.png", "c.PNG"), PIXELS, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "notes.txt").write_text("not an image")
    return folder


HOW = {"format": "PNG", "preparation": "none"}


def test_a_folder_is_read_in_the_order_of_its_paths(folder):
    images = FolderImages(folder)
    assert [images.name_of(i).removeprefix(f"{folder}/") for i in range(4)] == [
        "a/10.png",
        "a/2.png",
        "b/1.png",
        "c.PNG",
    ]
    assert np.array_equal(images[0], PIXELS[2])
    assert images.describe() == {"images": str(folder), "count": 4, "shape": [10, 12, 3], **HOW}


def test_linked_folders_are_entered(folder, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "train").symlink_to(folder)
    assert len(FolderImages(tmp_path / "links")) == 4


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_an_npz_of_adms_layout_is_read(tmp_path, save):
    save(tmp_path / "images.npz", other=np.zeros(5), arr_0=PIXELS)
    images = open_images(str(tmp_path / "images.npz"), RawImageArguments())
    assert len(images) == 4
    assert np.array_equal(images[3], PIXELS[3])
    assert images.name_of(3) == f"image 3 of {tmp_path / 'images.npz'}"


def test_an_npz_is_written_in_adms_layout(folder, tmp_path):
    save_npz_images(tmp_path / "out.npz", FolderImages(folder))
    with np.load(tmp_path / "out.npz") as archive:
        assert archive.files == ["arr_0"]
        assert np.array_equal(archive["arr_0"], PIXELS[[2, 1, 0, 3]])


def test_gray_images_are_written_in_three_channels(tmp_path):
    Image.fromarray(PIXELS[0, ..., 0]).save(tmp_path / "gray.png")
    save_npz_images(tmp_path / "out.npz", FolderImages(tmp_path, "L"))
    assert np.array_equal(np.load(tmp_path / "out.npz")["arr_0"][0], np.repeat(PIXELS[0, ..., :1], 3, axis=2))


def test_data_sets_are_read(tmp_path):
    digits = open_images("digits", RawImageArguments())
    assert (len(digits), digits[0].shape) == (1797, (8, 8, 1))
    columns = {"picture": [Image.fromarray(pixels) for pixels in PIXELS]}
    dataset = Dataset.from_dict(columns, features=Features({"picture": ImageFeature()}))
    dataset.to_parquet(tmp_path / "images.parquet")
    images = open_images(str(tmp_path / "images.parquet"), RawImageArguments())
    assert np.array_equal(images[2], PIXELS[2])
    assert images.name_of(2) == f"row 2 of {tmp_path / 'images.parquet'}"


def test_with_a_resolution_images_are_prepared_as_in_training(folder):
    Image.fromarray(PIXELS[0, ..., 0]).resize((40, 20)).save(folder / "d.png")  # gray, and of another size
    images = FolderImages(folder, "RGB", resolution=6)
    assert {images[i].shape for i in range(5)} == {(6, 6, 3)}


def test_a_subset_is_random_and_the_same_every_time(folder):
    images = FolderImages(folder)
    subset = SubsetImages(images, 3)
    assert subset.indices.tolist() == SubsetImages(images, 3).indices.tolist()
    assert subset.describe()["count"] == 3
    assert subset.describe()["drawn_from"] == 4
    assert np.array_equal(subset[2], images[subset.indices[2]])
    assert subset.name_of(2) == images.name_of(subset.indices[2])
    with pytest.raises(ValueError, match="holds 4 images, not 5"):
        SubsetImages(images, 5)


def save_animation(path):
    frames = [Image.fromarray(pixels) for pixels in PIXELS]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def save_half(path):
    data = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(data, "PNG")
    path.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])


def png_of_16_bits():
    """An RGB image of 16 bits a channel, which Pillow reads but does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 12, 10, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(12 * 6) for _ in range(10)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def save(pixels, mode=None):
    image = Image.fromarray(pixels)
    return (image.convert(mode) if mode else image).save


GRAY = PIXELS[0, ..., 0]
BAD = {
    "grayscale": ("bad.png", save(GRAY), "mode is L, not RGB.*image_mode L"),
    "alpha": ("bad.png", save(PIXELS[0], "RGBA"), "mode is RGBA, not RGB"),
    "palette": ("bad.gif", save(PIXELS[0], "P"), "mode is P, not RGB"),
    "16 bits": ("bad.png", save(GRAY.astype(np.uint16)), "more than 8 bits"),
    "16 bits of color": ("bad.png", lambda path: path.write_bytes(png_of_16_bits()), "more than 8 bits"),
    "a transparent color": (
        "bad.png",
        lambda path: Image.fromarray(PIXELS[0]).save(path, transparency=(1, 2, 3)),
        "a transparent color",
    ),
    "CMYK": ("bad.jpg", save(PIXELS[0], "CMYK"), "mode is CMYK, not RGB"),
    "animated": ("bad.webp", save_animation, "an animation of 4 frames"),
    "another size": ("bad.png", save(PIXELS[0, :5]), "12x5 pixels, the first image 12x10"),
    "no image": ("bad.png", lambda path: path.write_text("hello"), "cannot identify image file"),
    "empty": ("bad.png", lambda path: path.write_bytes(b""), "cannot identify image file"),
    "truncated": ("bad.png", save_half, "truncated"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named(tmp_path, kind):
    name, write, message = BAD[kind]
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    write(tmp_path / name)
    images = FolderImages(tmp_path)
    assert images[0].shape == (10, 12, 3)
    with pytest.raises(CorruptImageError, match=f"Cannot use {tmp_path / name}: .*{message}"):
        images[1]


def test_folders_and_files_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no image"):
        open_images(str(tmp_path), RawImageArguments())
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nothing.npz"):
        open_images(str(tmp_path / "nothing.npz"), RawImageArguments())
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        open_images(str(tmp_path / "nothing"), RawImageArguments())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS}, "has no array arr_0; it has images"),
        ({"arr_0": PIXELS / 255}, r"arr_0 has type float64 and shape \(4, 10, 12, 3\); images are uint8"),
        ({"arr_0": PIXELS[0]}, r"shape \(10, 12, 3\)"),
        ({"arr_0": PIXELS.transpose(0, 3, 1, 2)}, r"shape \(4, 3, 10, 12\)"),
        ({"arr_0": PIXELS[:0]}, r"shape \(0, 10, 12, 3\)"),
    ],
)
def test_an_npz_of_something_else_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"bad.npz.*{message}"):
        NpzImages(tmp_path / "bad.npz")


def test_a_truncated_npz_is_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", arr_0=PIXELS)
    (tmp_path / "bad.npz").write_bytes((tmp_path / "bad.npz").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"bad.npz is not a complete .npz file"):
        NpzImages(tmp_path / "bad.npz")
