"""Draw command lines and YAML files that a careless or hostile user could give."""

import dataclasses
import functools
import json
import os
import random
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from sdt_diffusion.utils.arguments import JSON_FIELD_ENDING, SECRET_KEY
from sdt_diffusion.utils.ranges import RANGE_KEY, alternatives

from .bases import Base, argument_types
from .formats import ODD_YAML

FLOATS = ("nan", "inf", "-inf", "-1", "0", "2", "1e30", "1e8", "-1e-9", "1e-320", "-0.0", "1e400", "-1e30")
INTEGERS = ("-1", "0", "1", "3", "100000000", "999999999", "1000000", str(2**31), str(2**63), f"1{'0' * 30}", "-1000")
NO_NUMBERS = ("", "ten", "0x10", "1e3", "0.5", "nan", "1,000", "9" * 400)
#: More than this is much work where a number counts something.
MUCH = 100_000
TEXTS = (
    *("", " ", "nowhere", "images", "config.yaml", "config.yaml/below", "pipe", "loop", "../..", "/proc", "/dev/zero"),
    *("x" * 300, "a\nb", "\N{PILE OF POO}", "-", "--", "%s%n", "*", "[", "~nobody/x", "$HOME", "None", "\udce9", "."),
    *("locked/out", "/proc/self/mem", "a:b", "nan", "0", "no.json", "no.png", "no.npz", "no.safetensors"),
)
JSON_TEXTS = (
    *("", "null", "[]", "3", '"text"', "{", '{"num_layers": "two"}', '{"num_layers": 1e9}', '{"num_layers": -1}'),
    *('{"num_layers": null}', '{"num_layers": 0}', '{"num_layers": 1.5}', '{"unknown": 1}', '{"patch_size": 0}'),
    *(
        '{"dropout": NaN}',
        '{"dropout": 2}',
        '{"num_attention_heads": [2]}',
        '{"hidden_sizes": [16]}',
        '{"depths": {}}',
    ),
    *('{"hidden_sizes": "abc"}', '{"depths": [0]}', '{"attention_head_dim": 3}', '{"mlp_ratio": -1}', "{" * 100_000),
    *('{"mlp_ratio": 1e30}', '{"norm_eps": -1}', '{"norm_eps": NaN}', '{"num_layers": true}', '{"": {}}'),
    *('{"num_layers": 1, "num_layers": 2}', '{"a": ' * 5000, '{"rotary": "yes"}', '{"_class_name": "Other"}'),
)
TOKEN = "hf_FuzzSecretTokenThatNobodyMaySee00"


@dataclasses.dataclass(frozen=True)
class Draw:
    """A drawn command line.

    Attributes:
        argv: Its words.
        change: What was changed, in words.
        must_fail: Whether completing would be wrong.
        may_run_on: Whether it asks for much work within what is allowed.
        environment: Further variables of the environment.
    """

    argv: list[str]
    change: str
    must_fail: bool = False
    may_run_on: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@functools.cache
def fields_of(script: str) -> dict[str, tuple[dataclasses.Field, tuple[Any, ...]]]:
    """Return the fields of all arguments of a script, with the alternatives of their types."""
    found = {}
    for each in argument_types(script):
        hints = get_type_hints(each)
        found.update({f.name: (f, alternatives(hints[f.name])) for f in dataclasses.fields(each) if f.init})
    return found


def prepare(folder: Path) -> None:
    """Make what hostile paths name: a pipe, a link to itself, and a folder that nobody can write to."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "locked").write_text("a file where a folder is wanted\n")


def hostile_value(name: str, field: dataclasses.Field, kinds: tuple[Any, ...], rng: random.Random):
    """Return a value for a field, whether it must be refused, and whether it may mean much work."""
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if name.endswith(JSON_FIELD_ENDING):
        return rng.choice(JSON_TEXTS), False, False
    if bool in kinds:
        value = rng.choice(["maybe", "", "2", "nan", "True", "no"])
        return value, value in ("maybe", "", "2", "nan"), False
    if choices:
        value = rng.choice(["wrong", "", "None", str(choices[0]).upper() + " "])
        return value, True, False
    if int in kinds or float in kinds:
        right = FLOATS if float in kinds else INTEGERS
        value = rng.choice(right if rng.random() < 0.85 else NO_NUMBERS)
        try:
            number = int(value) if float not in kinds else float(value)
        except ValueError:
            return value, True, False
        allowed = field.metadata.get(RANGE_KEY)
        finite = abs(number) < 1e300
        must_fail = not finite or (allowed is not None and not allowed.has(number))
        return value, must_fail, finite and abs(number) > MUCH
    return rng.choice(TEXTS), False, False


def draw_command(base: Base, rng: random.Random) -> Draw:
    """Change one to three arguments of a good command line."""
    argv, changes, must_fail, may_run_on = base.argv, [], False, False
    fields = fields_of(base.script)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind = rng.choice(["value"] * 20 + ["unknown", "no value", "twice", "dropped", "word", "hyphens"])
        name = rng.choice(sorted(fields))
        if kind == "value":
            value, fails, much = hostile_value(name, *fields[name], rng)
            new = [f"--{name}={value}"] if rng.random() < 0.5 or value.startswith("-") else [f"--{name}", value]
            must_fail, may_run_on = must_fail or fails, may_run_on or much
        elif kind == "unknown":
            new, must_fail = [rng.choice([f"--{name}s", f"--{name[:-1]}", "--nonsense", "-x", "---"]), "1"], True
        elif kind == "no value":
            new = [f"--{name}"]
            must_fail = must_fail or not {bool, list} & {*fields[name][1], fields[name][0].default_factory}
        elif kind == "word":
            new = [rng.choice(["stray", "", "@config.yaml", "images"])]
        elif kind == "hyphens":
            new = [f"--{name.replace('_', '-')}"]
        else:
            flags = [word for word in argv if word.startswith("--")]
            if not flags:
                continue
            at = argv.index(rng.choice(flags))
            pair = argv[at : at + 2]
            argv = argv + pair if kind == "twice" else argv[:at] + argv[at + 2 :]
            changes.append(f"{kind}: {pair[0]}")
            continue
        argv = [*argv, *new]
        changes.append(" ".join(new))
    # A later flag of the same name replaces an earlier one, and with it what had to fail.
    names = [word.partition("=")[0] for change in changes for word in change.split()[:1]]
    sure = must_fail and len(set(names)) == len(names) and not {"twice:", "dropped:"} & set(names)
    return Draw(argv, " | ".join(changes), sure, may_run_on)


def draw_yaml(base: Base, rng: random.Random, folder: Path) -> Draw:
    """Give arguments in a YAML file that holds odd values."""
    fields = fields_of(base.script)
    name = rng.choice(sorted(fields))
    must_fail = may_run_on = False
    kind = rng.choice(["value", "value", "odd", "structure"])
    if kind == "odd":
        words = rng.choice(sorted(ODD_YAML))
        text = ODD_YAML[words]
    elif kind == "value":
        value, must_fail, may_run_on = hostile_value(name, *fields[name], rng)
        text = yaml.safe_dump({name: value})
        words = f"{name}: {value}"
    else:
        value = rng.choice(
            [{"a": 1}, [1, [2]], [], {}, None, [None], [{"a": 1}], 10**400, b"\xff\xfe", [True, "x"], {1, 2}]
        )
        text = yaml.safe_dump({name: value})
        words = f"{name}: {value}"
    (folder / "drawn.yaml").write_text(text)
    argv = base.argv
    if f"--{name}" in argv:  # the command line wins
        at = argv.index(f"--{name}")
        argv = argv[:at] + argv[at + 2 :]
    return Draw([*argv, "--config", "drawn.yaml"], f"YAML {words}", must_fail, may_run_on)


def draw_secret(base: Base, rng: random.Random, folder: Path) -> Draw:
    """Hand over a token in one of its spellings."""
    secret = [name for name, (field, _) in fields_of(base.script).items() if field.metadata.get(SECRET_KEY)]
    name = secret[0] if secret else "hub_token"
    spellings = {
        "two words": [f"--{name}", TOKEN],
        "one word": [f"--{name}={TOKEN}"],
        "hyphens": [f"--{name.replace('_', '-')}", TOKEN],
        "hyphens, one word": [f"--{name.replace('_', '-')}={TOKEN}"],
        "twice": [f"--{name}", "first", f"--{name}", TOKEN],
        "mistyped": [f"--{name}s={TOKEN}"],
        "mistyped, two words": [f"--{name}s", TOKEN],
        "a list too many": [f"--{name}", TOKEN, TOKEN],
        "YAML": ["--config", "drawn.yaml"],
        "YAML list": ["--config", "drawn.yaml"],
        "environment": [],
    }
    kind = rng.choice(sorted(spellings))
    if kind.startswith("YAML"):
        value = [TOKEN] if kind == "YAML list" else TOKEN
        (folder / "drawn.yaml").write_text(json.dumps({name: value}))
    push = ["--push_to_hub", "--hub_model_id", "me/model"] if rng.random() < 0.3 else []
    environment = {"HF_TOKEN": TOKEN} if kind == "environment" else {}
    argv = base.argv
    if "--config" in argv and kind.startswith("YAML"):
        at = argv.index("--config")
        argv = argv[:at] + argv[at + 2 :]
    return Draw(
        [*argv, *spellings[kind], *push], f"token: {kind}{' and push' if push else ''}", environment=environment
    )
