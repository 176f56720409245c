"""Which config the flags of a model make."""

import pytest

from sdt_diffusion.sdt import PRESETS
from sdt_diffusion.sdt.presets import PLUS
from sdt_diffusion.training.model_arguments import CONFIG_KEYS, ModelArguments
from sdt_diffusion.utils.arguments import parse_arguments


def config_of(*argv):
    (arguments,) = parse_arguments((ModelArguments,), argv)
    return arguments.config()


def test_what_is_not_given_is_the_presets():
    for name, preset in PRESETS.items():
        assert preset.items() <= config_of("--model", name).items()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--qk_norm", "none"], {"qk_norm": None}),
        (["--rotary", "False"], {"rotary": False}),
        (["--norm_type", "layer"], {"norm_type": "layer"}),
        (
            ["--activation_fn", "gelu-approximate", "--mlp_ratio", "4"],
            {"activation_fn": "gelu-approximate", "mlp_ratio": 4},
        ),
        (["--adaln", "low_rank", "--adaln_rank", "8"], {"adaln": "low_rank", "adaln_rank": 8}),
        (["--num_registers", "4", "--position_embedding", "none"], {"num_registers": 4, "position_embedding": "none"}),
        (["--long_skips", "--network_output", "clean"], {"long_skips": True, "network_output": "clean"}),
        (["--model_overrides", '{"rotary": false}'], {"rotary": False}),
    ],
    ids=lambda value: "".join(value[:1]) if isinstance(value, list) else "",
)
def test_flags_win_over_the_preset_and_change_nothing_else(flags, expected):
    preset = config_of("--model", "SDT-S/2+")
    assert PLUS.items() <= preset.items()
    assert config_of("--model", "SDT-S/2+", *flags) == {**preset, **expected}


def test_bare_switches_turn_on_what_the_preset_leaves_off():
    assert config_of("--model", "SDT-S/2", "--rotary")["rotary"] is True


def test_every_flag_of_the_config_is_a_key_of_it():
    assert set(CONFIG_KEYS) <= config_of().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adaln": "half"}, "adaln must be full or single or low_rank"),
        ({"num_registers": -1}, "num_registers must be at least 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be more than 0"),
        ({"adaln_rank": 0}, "adaln_rank must be at least 1"),
        ({"network_output": "noise"}, "network_output must be prediction or clean"),
    ],
)
def test_other_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**arguments)
