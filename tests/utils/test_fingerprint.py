from sdt_diffusion.utils.fingerprint import differences


def test_each_difference_is_named():
    there, now = {"a": 1, "b": "x", "names": [1] * 1000, "same": 0}, {"a": 2, "c": None, "names": [], "same": 0}
    assert differences(there, now, unquoted=("names",)) == ["a: 1 there, 2 now", "b: 'x' there, None now", "names"]
