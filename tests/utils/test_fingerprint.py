from sdt_diffusion.utils.fingerprint import differences


def test_each_difference_is_named():
    there, now = {"a": 1, "b": "x", "names": [1] * 1000, "same": 0}, {"a": 2, "c": None, "names": [], "same": 0}
    assert differences(there, now, unquoted=("names",)) == ["a: 1 there, 2 now", "b: 'x' there, None now", "names"]


def test_json_values_are_compared_as_objects():
    def found(there, now):
        return differences({"model_overrides": there}, {"model_overrides": now})

    assert found('{"num_layers": 6, "rotary": true}', ' {"rotary":true,"num_layers":6}') == []
    assert found('{"num_layers": 6}', '{"num_layers": 7}') == [
        """model_overrides: '{"num_layers": 6}' there, '{"num_layers": 7}' now"""
    ]
    assert found('{"num_layers": 6', '{"num_layers":6')  # no JSON: compared as text
    assert found("1.0", "1")  # a text such as a path is not a JSON object
    assert found(None, "{}")
