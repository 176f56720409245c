"""Arrays of `.npz` files that others have damaged or prepared."""

import contextlib
import zipfile

import numpy as np
import pytest

from sdt_diffusion.data.raw_images import map_npz_array


class TestNpz:
    @staticmethod
    def write(path, header, data, **changes):
        text = f"{{'descr': {header[0]}, 'fortran_order': {header[1]}, 'shape': {header[2]}, }}".encode()
        member = b"\x93NUMPY" + changes.get("version", b"\1\0") + len(text).to_bytes(2, "little") + text + data
        with zipfile.ZipFile(path, "w", changes.get("compression", zipfile.ZIP_STORED)) as archive:
            archive.writestr("arr_0.npy", member)

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (("'|O'", False, "(1, 2, 2, 3)"), "type object, which is not one of plain numbers"),
            (("[('a', '|O'), ('b', '<i8')]", False, "(6,)"), "not one of plain numbers"),
            (("'|V0'", False, "(6,)"), "not one of plain numbers"),
            (("'|u1'", False, "(1000000000000, 2, 2, 3)"), "it has 96 bytes of data, and uint8 of shape"),
            (("'|u1'", False, "(-1, 8, 4, -3)"), r"it has the shape \(-1, 8, 4, -3\)"),
            (("'|u1'", True, "(1, 8, 4, 2)"), "it has 96 bytes of data, and uint8 of shape"),
            (("'|u1'", False, "(0, 8, 4, 3)"), "it has 96 bytes of data, and uint8 of shape"),
            (("'|u1'", False, "[1]"), "shape"),
            (("__import__('os')", False, "(1,)"), "malformed node"),
            (
                ("'|u1'", False, "(" + "1," * 20_000 + ")"),
                r"Header info length \(40055\) is large and may not be safe to load securely\.$",
            ),
        ],
    )
    def test_arrays_that_cannot_be_mapped(self, tmp_path, header, message, compression):
        self.write(tmp_path / "x.npz", header, b"A" * 96, compression=compression)
        with pytest.raises(ValueError, match=rf"x\.npz is not a complete .* with numbers in arr_0: .*{message}"):
            map_npz_array(tmp_path / "x.npz", "arr_0")

    def test_pickled_objects(self, tmp_path):
        np.savez(tmp_path / "x.npz", arr_0=np.array([{"a": 1}, None], dtype=object))
        with pytest.raises(ValueError, match="type object, which is not one of plain numbers"):
            map_npz_array(tmp_path / "x.npz", "arr_0")

    def test_other_versions_of_the_format(self, tmp_path):
        self.write(tmp_path / "x.npz", ("'|u1'", False, "(1, 8, 4, 3)"), b"A" * 96, version=b"\x09\0")
        with pytest.raises(ValueError, match=r"x\.npz is not a complete"):
            map_npz_array(tmp_path / "x.npz", "arr_0")

    @pytest.mark.parametrize("order", ["C", "F"])
    def test_arrays_of_both_orders_are_mapped(self, tmp_path, order):
        values = np.asarray(np.arange(24).reshape(2, 3, 4), order=order)
        np.savez(tmp_path / "x.npz", a=np.zeros(3), arr_0=values, b=np.ones(2))
        assert np.array_equal(map_npz_array(tmp_path / "x.npz", "arr_0"), values)

    def test_encrypted_members_are_named(self, tmp_path):
        np.savez(tmp_path / "x.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8))
        content = bytearray((tmp_path / "x.npz").read_bytes())
        content[content.index(b"PK\1\2") + 8] |= 1
        content[6] |= 1
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz is not a complete .*encrypted"):
            map_npz_array(tmp_path / "x.npz", "arr_0")

    def test_data_that_reach_into_the_next_member(self, tmp_path):
        np.savez(tmp_path / "x.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8), b=np.zeros(100))
        content = bytearray((tmp_path / "x.npz").read_bytes())
        central = content.index(b"PK\1\2")
        size = int.from_bytes(content[central + 24 : central + 28], "little")
        header = content.index(b"(1, 2, 2, 3)")
        content[header : header + 12] = b"(9, 2, 2, 3)"
        for field in (central + 20, central + 24):
            content[field : field + 4] = (size + 96).to_bytes(4, "little")
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz is not a complete"):
            map_npz_array(tmp_path / "x.npz", "arr_0")

    def test_every_cut_and_every_flipped_bit_is_either_refused_or_harmless(self, tmp_path):
        np.savez(tmp_path / "whole.npz", arr_0=np.arange(48, dtype=np.uint8).reshape(2, 2, 4, 3))
        whole = (tmp_path / "whole.npz").read_bytes()
        damaged = [whole[:size] for size in range(0, len(whole), 7)]
        for place in range(len(whole)):
            content = bytearray(whole)
            content[place] ^= 1 << place % 8
            damaged.append(bytes(content))
        for content in damaged:
            (tmp_path / "x.npz").write_bytes(content)
            with contextlib.suppress(ValueError):
                np.array(map_npz_array(tmp_path / "x.npz", "arr_0")).sum()
