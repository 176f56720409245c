import json
import os
import random
import shutil
import threading

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from sdt_diffusion.utils import reading
from sdt_diffusion.utils.fingerprint import fingerprint_files
from sdt_diffusion.utils.reading import (
    CHECKSUMS_FILE,
    PlainYamlDumper,
    check_tensors,
    checksum,
    read_json,
    read_tensors,
    read_yaml,
    verify_checksums,
    walk_files,
    write_checksums,
)


@pytest.fixture
def file(tmp_path):
    def write(content, name="values.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "values.json is damaged: it is not valid JSON"),
        ('{"a": 1', "values.json is damaged: it is not valid JSON"),
        ("[" * 100_000, "values.json is damaged: it is not valid JSON"),
        ('{"a": NaN}', "values.json is damaged: it is not valid JSON .it holds NaN."),
        ("[1]", "values.json is damaged: it holds a list, not a dict."),
        (b"\xff\xfe\x00", "values.json is damaged: it is not a text in UTF-8."),
        ('{"a": ' + "9" * 5000 + "}", "values.json is damaged: it is not valid JSON"),
    ],
)
def test_damaged_json_is_refused_by_name(file, content, message):
    with pytest.raises(ValueError, match=message):
        read_json(file(content))


def test_what_is_no_text_file_is_refused_at_once(file, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="pipe is not a file"):
        read_json(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "loop", tmp_path / "missing"):
        with pytest.raises((OSError, ValueError), match=str(path)):
            read_json(path)
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 10)
    with pytest.raises(ValueError, match="11 bytes, too many"):
        read_json(file("[1,2,3,4,5]"))


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, r"aliases such as \*a are not supported"),
        ("base: &b {a: 1}\nrun:\n  <<: *b\n", "aliases such as"),
        ("[1, 2]", "must hold a mapping"),
        ("just words", "must hold a mapping"),
        ("a: [", "is not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "is not valid YAML"),
        ("? [1, 2]\n: 3", "is not valid YAML"),
        ("{" * 5000, "is not valid YAML"),
        (b"\xff\xfe\x00", "not a text in UTF-8"),
    ],
)
def test_odd_yaml_is_refused_by_name(file, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(file(content, "run.yaml"))
    assert "run.yaml" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_is_written_twice_is_read_again(file):
    shared = [0.05, 0.1]
    text = yaml.dump({"a": shared, "b": shared}, Dumper=PlainYamlDumper)
    assert read_yaml(file(text)) == {"a": shared, "b": shared}
    assert read_yaml(file("")) == {}


def test_tensors_are_read_or_the_file_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(3.0)}, path)
    assert read_tensors(path)["a"].tolist() == [0, 1, 2]
    content = path.read_bytes()
    for damaged in (b"", content[:20], content[:-1], bytes(len(content)), b"\xff" * 8 + content[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
            read_tensors(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_tensors(tmp_path)


EXPECTED = {"a": torch.zeros(2, 3), "n": torch.zeros(1, dtype=torch.long)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, "x does not fit: it lacks a"),
        ({"b": torch.zeros(1)}, "x does not fit: it has b"),
        ({"a": torch.zeros(3, 2)}, r"x does not fit: a is torch.float32 of shape \(3, 2\)"),
        ({"a": torch.zeros(2, 3, dtype=torch.int8)}, "x does not fit: a is torch.int8"),
        ({"a": torch.full((2, 3), torch.nan)}, "x cannot be used: a has values that are NaN or infinite"),
        ({"a": torch.full((2, 3), torch.inf)}, "x cannot be used: a has values that are NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message):
    check_tensors(EXPECTED, EXPECTED, "x")
    found = {name: tensor for name, tensor in {**EXPECTED, **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        check_tensors(found, EXPECTED, "x")


def test_every_file_is_found_once_whatever_the_links(tmp_path):
    folder = tmp_path / "images"
    for name in ("a/1.png", "a/b/2.png", ".hidden/3.png", "4.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "5.png").touch()
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "a" / "itself").symlink_to("itself")
    os.mkfifo(folder / "pipe")
    assert sorted(name for name, _ in walk_files(folder)) == ["4.png", "a/1.png", "a/b/2.png", "c/5.png"]
    finished = threading.Event()
    threading.Thread(target=lambda: (fingerprint_files(str(folder)), finished.set()), daemon=True).start()
    assert finished.wait(10)


def test_any_flipped_bit_of_weights_is_noticed(tmp_path):
    save_file({"a": torch.randn(64)}, tmp_path / "model.safetensors")
    save_file({"b": torch.randn(64)}, tmp_path / "more.safetensors")
    verify_checksums(tmp_path)  # nothing is known of them yet
    write_checksums(tmp_path)
    verify_checksums(tmp_path)
    assert set(json.loads((tmp_path / CHECKSUMS_FILE).read_text())) == {"model.safetensors", "more.safetensors"}
    draw = random.Random(0)
    for name in ("model.safetensors", "more.safetensors"):
        content = (tmp_path / name).read_bytes()
        for _ in range(20):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            (tmp_path / name).write_bytes(damaged.tobytes())
            with pytest.raises(ValueError, match=f"{name} is damaged: its SHA-256"):
                verify_checksums(tmp_path)
        (tmp_path / name).write_bytes(content)
    verify_checksums(tmp_path)
    (tmp_path / "more.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not complete: more\.safetensors"):
        verify_checksums(tmp_path)


def test_a_file_that_has_become_huge_is_not_read(tmp_path, monkeypatch):
    save_file({"a": torch.randn(64)}, tmp_path / "model.safetensors")
    write_checksums(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 64 << 30)
    monkeypatch.setattr(reading, "checksum", lambda path: pytest.fail("it is read"))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        verify_checksums(tmp_path)


@pytest.mark.parametrize("values", [{"model.safetensors": "0"}, {"model.safetensors": {"size": "1"}}])
def test_checksums_of_another_form_are_damaged(tmp_path, values):
    save_file({"a": torch.randn(64)}, tmp_path / "model.safetensors")
    (tmp_path / CHECKSUMS_FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        verify_checksums(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd"])
def test_checksums_name_no_files_elsewhere(tmp_path, name):
    (tmp_path / CHECKSUMS_FILE).write_text(json.dumps({name: "0" * 64}))
    with pytest.raises(ValueError, match="is not complete"):
        verify_checksums(tmp_path)


def test_the_checksum_is_the_one_that_sha256sum_prints(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert checksum(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert shutil.which("sha256sum") is None or checksum(tmp_path / "x") in os.popen(f"sha256sum {tmp_path}/x").read()
