"""Damage a file knowing its format, so that it still opens and holds something wrong."""

import copy
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

#: Ends the description of a value that no one can mean.
NONSENSE = "(nonsense)"
#: Stands for text that no JSON writer would write.
RAW = "@@raw@@"
WRONG_VALUES = (
    *(None, True, -1, 0, 0.5, 10**30, "", "wrong", "../..", "/dev/zero", [], {}, [[]], {"a": {"b": 1}}, [1, 2, 3]),
    *("x" * 100_000, ["a"] * 1000, "\ud800", "\n", f"{RAW}NaN", f"{RAW}1e999", f"{RAW}-Infinity", f"{RAW}-1e300"),
    *(f"{RAW}{'[' * 100_000}", f"{RAW}{'9' * 5000}", f"{RAW}{'[' * 500}{']' * 500}"),
)


def wrong_value(path, rng):
    """Give a random key of a JSON or YAML file a wrong value, take it away, or add one."""
    is_yaml = path.suffix == ".yaml"
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(max(len(lines), 1))
    tree, is_nonsense = yaml.safe_load(lines[number]) if is_yaml else json.loads(lines[number]), True
    value = copy.deepcopy(rng.choice(WRONG_VALUES))
    places = list(_places(tree))
    if not places or rng.random() < 0.05:
        tree, words = value, "all"
    else:
        parent, key = rng.choice(places)
        words, is_nonsense = f"{key}", value is not None and _kind(value) != _kind(parent[key])
        if rng.random() < 0.1:
            del parent[key]
            value, is_nonsense = "(no value)", False
        elif rng.random() < 0.07 and isinstance(parent, dict):
            words, is_nonsense = "a new key", False
            parent["unknown"] = value
        else:
            parent[key] = value
    dumped = yaml.safe_dump(tree) if is_yaml and RAW not in str(value) else json.dumps(tree)
    if isinstance(value, str) and value.startswith(RAW):
        dumped = dumped.replace(json.dumps(value), value.removeprefix(RAW))
    lines[number] = dumped
    path.write_text("\n".join(lines) + "\n")
    return f"{words} = {ascii(value)[:60]}{f' {NONSENSE}' if is_nonsense else ''}"


def _kind(value):
    """Return the kind of a value; numbers that no setting has are a kind of their own."""
    if isinstance(value, str):
        return "nonsense" if value.startswith(RAW) or len(value) > 1000 else "text"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number" if abs(value) < 1e29 else "nonsense"
    return type(value).__name__


def _places(tree):
    """Yield every container with each of its keys."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from _places(tree[key])


def _tensors(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def wrong_tensor(path, rng):
    """Change one tensor of a safetensors file: its type, shape, name or values."""
    tensors, metadata = _tensors(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kinds = ["int8", "float64", "complex64", "flat", "more", "fewer", "nan", "inf", "missing", "extra", "renamed"]
    kind = rng.choice([*kinds, "empty", "swapped", "no tensors", "scalar"])
    if kind in ("int8", "float64", "complex64"):
        tensors[name] = tensor.to(getattr(torch, kind))
    elif kind in ("nan", "inf"):
        tensors[name] = tensor = (tensor if tensor.is_floating_point() else tensor.float()).clone()
        if tensor.numel():
            tensor.view(-1)[rng.randrange(tensor.numel())] = float(kind)
    elif kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["extra"] = torch.zeros(3)
    elif kind == "renamed":
        tensors[f"{name}_"] = tensors.pop(name)
    elif kind == "swapped":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
        kind = f"swapped with {other}" if other != name else "as it was"
    elif kind == "no tensors":
        tensors = {}
    else:
        shapes = {
            "flat": lambda: tensor.flatten(),
            "more": lambda: torch.cat([tensor.reshape(1, *tensor.shape)] * 2),
            "fewer": lambda: tensor[:1] if tensor.ndim else tensor.reshape(1),
            "empty": lambda: tensor[:0] if tensor.ndim else torch.zeros(0),
            "scalar": lambda: torch.tensor(1.0),
        }
        tensors[name] = shapes[kind]().contiguous()
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return f"{name}: {kind}"


def wrong_header(path, rng):
    """Let the header of a safetensors file lie."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    kind = rng.choice(["length", "shape", "offsets", "metadata", "nesting"])
    if kind == "length":
        path.write_bytes(struct.pack("<Q", rng.choice([0, 2**63, 2**40, length + 1])) + content[8:])
        return "header: length"
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([key for key in sorted(header) if key != "__metadata__"])
    if kind == "shape":
        header[name]["shape"] = rng.choice([[2**62, 4], [-1], ["a"], [0], 7])
    elif kind == "offsets":
        header[name]["data_offsets"] = rng.choice([[0, 2**60], [5, 1], [-4, 4], "all"])
    else:
        header["__metadata__"] = {"a": {"b": 1}} if kind == "metadata" else json.loads("[" * 90 + "]" * 90)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return f"header: {kind}"


def wrong_array(path, rng):
    """Change an array of an .npz or .npy file."""
    single = path.suffix == ".npy"
    arrays = {"": np.load(path)} if single else dict(np.load(path))
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    numbers = array if array.dtype.kind in "biuf" else np.zeros(3)
    kinds = {
        "object": lambda: np.array([{"a": 1}, None], dtype=object),
        "text": lambda: array.astype(str),
        "bool": lambda: numbers.astype(bool),
        "float16": lambda: numbers.astype(np.float16),
        "float64": lambda: numbers.astype(np.float64),
        "complex64": lambda: numbers.astype(np.complex64),
        "int64": lambda: numbers.astype(np.int64),
        "nan": lambda: np.full(array.shape, np.nan, np.float32),
        "flat": lambda: array.reshape(-1),
        "more": lambda: np.stack([array, array]),
        "fewer": lambda: array[:1] if array.ndim else array,
        "empty": lambda: array[:0] if array.ndim else np.zeros(0),
        "scalar": lambda: np.float64(1),
        "times": lambda: np.full(array.shape, "2020-01-01", "M8[s]"),
        "records": lambda: np.zeros(3, dtype=[("a", "i4"), ("b", "O")]),
        "order": lambda: np.asfortranarray(array),
        "missing": None,
        "extra": None,
        "header": None,
    }
    kind = rng.choice(sorted(kinds))
    if kind == "header" or (single and kinds[kind] is None):
        return _wrong_array_header(path, rng)
    if kind == "missing":
        del arrays[name]
    elif kind == "extra":
        arrays["extra"] = np.zeros(3)
    else:
        arrays[name] = kinds[kind]()
    with path.open("wb") as file:
        if single:
            np.save(file, arrays[""], allow_pickle=True)
        else:
            np.savez(file, **arrays)
    return f"{name}: {kind}"


def _wrong_array_header(path, rng):
    """Let the first array promise more than there is, or hold pointers."""
    content = path.read_bytes()
    start = content.find(b"\x93NUMPY")
    end = content.find(b"}", start)
    header = content[start + 10 : end + 1]
    at = header.find(b"'shape': (") + len(b"'shape': (")
    digits = header[at : at + 1]
    kind = rng.choice(["shape", "descr"])
    new = header
    if kind == "shape" and digits.isdigit():
        new = header[:at] + b"9" + header[at + 1 :]
    elif b"'|u1'" in header or b"'<f8'" in header:
        new = header.replace(b"'|u1'", b"'|O8'").replace(b"'<f8'", b"'|O8'")
    path.write_bytes(content[: start + 10] + new + content[end + 1 :])
    return f"array header: {kind}"


def odd_image(path, rng):
    """Replace a PNG by another picture, which can be a trap."""
    kinds = ("wide", "tall", "small", "animated", "palette", "deep", "transparent", "float", "cmyk", "lies", "bomb")
    kind = rng.choice(kinds)
    sizes = {"wide": (65_000, 1), "tall": (1, 65_000), "small": (1, 1)}
    modes = {"palette": "P", "deep": "I;16", "transparent": "RGBA", "float": "F", "cmyk": "CMYK"}
    if kind in ("lies", "bomb"):
        side = 60_000 if kind == "lies" else 30_000
        row = zlib.compress(bytes(1000) if kind == "lies" else bytes(side // 8 * 100))
        header = struct.pack(">IIBBBBB", side, side, 8 if kind == "lies" else 1, 0, 0, 0, 0)
        parts = [(b"IHDR", header), (b"IDAT", row), (b"IEND", b"")]
        chunks = [struct.pack(">I", len(x)) + t + x + struct.pack(">I", zlib.crc32(t + x)) for t, x in parts]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    elif kind == "animated":
        frames = [Image.new("RGB", (20, 24), color) for color in ("red", "green", "blue")]
        frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])
    else:
        image = Image.new(modes.get(kind, "RGB"), sizes.get(kind, (20, 24)))
        image.save(path, {"float": "TIFF", "cmyk": "JPEG"}.get(kind, "PNG"))
    return f"picture: {kind}"


def odd_text(path, rng):
    """Give a text file lines that nobody expects."""
    lines = path.read_text().splitlines()
    number = rng.randrange(max(len(lines), 1))
    kind = rng.choice(["doubled", "blank", "latin-1", "nul", "long", "many", "missing"])
    new = {"blank": [""], "missing": [], "long": ["x" * 200_000], "many": lines * 1000, "nul": ["a\0b"]}
    lines[number : number + 1] = new.get(kind, [lines[number]] * 2)
    content = "\n".join(lines).encode()
    path.write_bytes(content + b"\n\xe9\xff" if kind == "latin-1" else content + b"\n")
    return f"text: {kind}"


ODD_YAML = {
    "bomb": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
    "code": "seed: !!python/object/apply:os.system ['touch pwned']\n",
    "binary": "seed: !!binary aGVsbG8=\n",
    "merge": "<<: {seed: 1}\n",
    "date": "seed: 2026-01-01\n",
    "number": "seed: !!float nan\n",
    "list": "- a\n- b\n",
    "word": "just words\n",
    "mapping as key": "? {a: 1}\n: 2\n",
    "list as key": "? [a, b]\n: 2\n",
    "unknown": "unknown_key:\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "tab": "seed:\t1\n\tb: 2\n",
    "deep": "seed: " + "[" * 5000 + "]" * 5000 + "\n",
    "set": "seed: !!set {a, b}\n",
    "twice": "seed: 1\nseed: two\n",
    "number as key": "1: 2\nnull: 3\n",
    "nul": "seed: 1\0\n",
    "long": "output_dir: " + "x" * 100_000 + "\n",
}


def odd_yaml(path, rng):
    kind = rng.choice(sorted(ODD_YAML))
    path.write_text(ODD_YAML[kind] + (path.read_text() if rng.random() < 0.5 else ""))
    return f"YAML: {kind}"


def odd_tar(path, rng):
    """Add a member to a tar that does not belong there."""
    kind = rng.choice(["above", "absolute", "link", "folder", "device", "text", "twice", "no label", "empty", "huge"])
    names = {"above": "../../pwned.png", "absolute": "/tmp/pwned.png", "twice": "0000.png", "no label": "9999.png"}
    member = tarfile.TarInfo(names.get(kind, "9999.png"))
    types = {"link": tarfile.SYMTYPE, "folder": tarfile.DIRTYPE, "device": tarfile.CHRTYPE}
    member.type = types.get(kind, tarfile.REGTYPE)
    member.linkname = "/etc/passwd" if kind == "link" else ""
    content = b"" if kind in ("empty", *types) else b"not a picture"
    member.size = 2**40 if kind == "huge" else len(content)
    with tarfile.open(path, "a") as tar:
        tar.fileobj.seek(tar.offset)
        tar.addfile(member, None if kind == "huge" else io.BytesIO(content))
    return f"tar: {kind}"


BY_ENDING = {
    ".json": (wrong_value,),
    ".jsonl": (wrong_value, odd_text),
    ".yaml": (wrong_value, odd_yaml, odd_yaml),
    ".safetensors": (wrong_tensor, wrong_tensor, wrong_tensor, wrong_header),
    ".npz": (wrong_array,),
    ".npy": (wrong_array,),
    ".png": (odd_image,),
    ".txt": (odd_text,),
    ".tar": (odd_tar,),
}
