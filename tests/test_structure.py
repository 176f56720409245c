"""Test that the package is built in floors: what lies below knows nothing of what lies above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sdt_diffusion"

#: From the lowest floor to the highest. A folder or module may import from its own room and from lower floors only.
#: `sdt_diffusion` is the package's own `__init__.py`, which registers the pipeline with diffusers.
FLOORS = [
    ["attention", "norms", "plots", "utils"],
    ["attention_processor"],
    ["blocks"],
    ["sdt", "sdt_h"],
    ["sdt_diffusion"],
    ["data"],
    ["probe"],
    ["classification"],
    ["convert", "hub", "metrics", "sampling"],
    ["evaluation"],
    ["demo"],
    ["training"],
    ["commands", "experiments"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODEL_ROOMS = {"attention", "attention_processor", "blocks", "norms", "sdt", "sdt_h", "probe", "classification"}

MAX_LINES = 400
MAX_FILES = 170


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path): path for path in FILES}


def room_of(module):
    """Return the folder or the module right below the package; its `__init__.py` is a room too."""
    return module.split(".")[1] if "." in module else module


def imports_of(path, for_types):
    """Return the modules of the package that a file imports anywhere, in functions too.

    Args:
        path: The file.
        for_types: Include imports under `if TYPE_CHECKING`, which are never executed.
    """
    package = list(path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text())
    if not for_types:
        conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
        for node in conditions:
            if ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                found.add(submodule if submodule in MODULES else origin)
    return {module for module in found if module in MODULES}


#: All that a file names, and what is executed of that.
IMPORTS, EXECUTED_IMPORTS = (
    {module: imports_of(path, for_types) - {module} for module, path in MODULES.items()} for for_types in (True, False)
)


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_room_and_from_lower_floors_only(module):
    room = room_of(module)
    upward = [
        imported
        for imported in IMPORTS[module]
        if room_of(imported) != room and FLOOR_OF[room_of(imported)] >= FLOOR_OF[room]
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle():
    finished = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in finished:
            for imported in sorted(EXECUTED_IMPORTS[module]):
                visit(imported, [*trail, module])
            finished.add(module)

    for module in MODULES:
        visit(module, [])


def test_no_model_imports_training():
    """Also not through other modules."""
    reached = [module for module in MODULES if room_of(module) in MODEL_ROOMS]
    for module in reached:
        reached.extend(IMPORTS[module] - set(reached))
    assert [module for module in reached if room_of(module) == "training"] == []


@pytest.mark.parametrize(
    "folder", ["sdt_diffusion", "train", "sample", "eval", "benchmarks", "examples", "experiments", "tests"]
)
def test_no_file_is_too_long_to_read(folder):
    lengths = {str(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_the_package_has_few_files():
    assert len(FILES) <= MAX_FILES


def test_no_two_modules_have_one_name():
    names = [path.stem for path in FILES if path.stem != "__init__"]
    names += [path.parent.name for path in FILES if path.stem == "__init__"]
    assert sorted({name for name in names if names.count(name) > 1}) == []
