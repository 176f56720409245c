"""Write a model's code beside its weights, so that it loads where this package is not installed.

    pipe.save_pretrained(folder, with_code=True)                           # a classifier, too
    write_code(folder)                                                     # what was saved without
    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)      # needs diffusers only

A file holds the definitions that its class needs, word for word from the modules of this package. It is one file
because diffusers downloads no others. Attention by custom operators, Triton and flex is left out; `dense` serves.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import write_atomically, write_json
from .reading import read_json

PACKAGE = "sdt_diffusion"
#: Modules that stay here, with the entries of tables that name them. What calls them must not do so without them.
LEFT_OUT = (
    *(f"{PACKAGE}.attention.{name}" for name in ("blockwise", "flex", "fused")),
    f"{PACKAGE}.utils.code_export",
)
#: Class of a part of a pipeline -> the module whose file its folder gets. The pipeline uses the guider's class itself:
#: from a file of the same name, diffusers makes one module for both.
PARTS = {
    "SDTTransformer2DModel": f"{PACKAGE}.sdt.transformer_sdt",
    "SDTGuidance": f"{PACKAGE}.sdt.pipeline_sdt",
    "FlowMatchSDEScheduler": f"{PACKAGE}.sdt.flow_sde",
}
#: The pipeline only names the transformer's class, as a type: this takes its place, so that its code is there once.
STAND_INS = {
    (f"{PACKAGE}.sdt.transformer_sdt", "SDTTransformer2DModel"): ("diffusers", "ModelMixin", "SDTTransformer2DModel")
}
#: `model_type` of a config of transformers -> module, and its class for each of `AUTO_CLASSES`.
TRANSFORMERS_CLASSES = {
    "sdt_h": (
        f"{PACKAGE}.sdt_h.modeling_sdt_h",
        ("SDTHConfig", "SDTHModel", "SDTHForImageClassification"),
    ),
    "sdt_classifier": (
        f"{PACKAGE}.probe",
        ("SDTClassifierConfig", "SDTModel", "SDTForImageClassification"),
    ),
}
IMAGE_PROCESSOR = (f"{PACKAGE}.sdt_h.modeling_sdt_h", "SDTHImageProcessor")
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")
HEADER = '''\
"""Code of {names}, to load a model without the package sdt_diffusion.

Written by version {version} of it, from the modules named below. Change it there, not here.
"""
'''


def write_code(folder: Path | str) -> list[Path]:
    """Write the code of a saved pipeline or classifier into its folder, and note in its configs where it is.

    Afterwards diffusers and transformers ask for `trust_remote_code=True`; `SDTPipeline.from_pretrained` and the
    scripts of this package go on using the package. Writing again replaces the code.

    Args:
        folder: What `save_pretrained` wrote.

    Returns:
        The files of code.

    Raises:
        FileNotFoundError: If the folder holds neither.
        ValueError: If it holds a model of another kind.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return _write_pipeline_code(folder)
    if (folder / "config.json").is_file():
        return _write_classifier_code(folder)
    raise FileNotFoundError(f"{folder} holds neither a pipeline (model_index.json) nor a classifier (config.json).")


def _write_pipeline_code(folder: Path) -> list[Path]:
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in ("SDTPipeline", ["pipeline_sdt", "SDTPipeline"]):
        raise ValueError(f"{folder} holds a {kind}, not an SDTPipeline.")
    index["_class_name"] = ["pipeline_sdt", "SDTPipeline"]
    pipeline = bundle([(f"{PACKAGE}.sdt.pipeline_sdt", "SDTPipeline")], STAND_INS)
    written = [_write(folder / "pipeline_sdt.py", pipeline)]
    for name, value in index.items():
        if isinstance(value, list) and value[1:] and str(value[1]) in PARTS:
            if not name.isidentifier() or not (folder / name).is_dir():  # nothing is written outside of the folder
                raise ValueError(f"{folder} is not whole: there is no {name}, which its model_index.json names.")
            module = PARTS[value[1]]
            file = module.rpartition(".")[2]
            text = pipeline if file == "pipeline_sdt" else bundle([(module, value[1])])
            written.append(_write(folder / name / f"{file}.py", text))
            index[name] = [file, value[1]]  # diffusers looks for a file of that name in the part's folder
    write_json(folder / "model_index.json", index)
    return written


def _write(path: Path, text: str) -> Path:
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    return path


def _write_classifier_code(folder: Path) -> list[Path]:
    config = read_json(folder / "config.json")
    if str(config.get("model_type")) not in TRANSFORMERS_CLASSES:
        raise ValueError(f"{folder} holds no model of this package: its model_type is {config.get('model_type')!r}.")
    module, classes = TRANSFORMERS_CLASSES[config["model_type"]]
    file = module.rpartition(".")[2]
    references = {auto: f"{file}.{name}" for auto, name in zip(AUTO_CLASSES, classes, strict=True)}
    path = _write(folder / f"{file}.py", bundle([IMAGE_PROCESSOR, *((module, name) for name in classes)]))
    write_json(folder / "config.json", {**config, "auto_map": references})
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        reference = {"AutoImageProcessor": f"{file}.{IMAGE_PROCESSOR[1]}"}
        write_json(processor, {**read_json(processor), "auto_map": reference})
    return [path]


def bundle(
    definitions: Sequence[tuple[str, str]],
    stand_ins: Mapping[tuple[str, str], tuple[str, str, str]] | None = None,
) -> str:
    """Return the source of one file that holds definitions, and all that they need of this package.

    Args:
        definitions: Modules, such as "sdt_diffusion.sdt.transformer_sdt", and a name in each.
        stand_ins: (module, name) -> (library, name there, name here) of what to import in place of a definition.

    Raises:
        ValueError: If a module does not know a name, or two definitions have one name.
    """
    collected = _Bundle(stand_ins or {})
    for module, name in definitions:
        collected.add(module, name)
    collected.add_effects()
    version = sys.modules[PACKAGE].__version__
    return HEADER.format(names=definitions[-1][1], version=version) + collected.text()


@dataclass
class _Statement:
    """A statement of a module's top level, with the comments above it."""

    text: str
    used: set[str]
    is_definition: bool  # of a function or class


@dataclass
class _Module:
    """What a module defines and imports.

    Attributes:
        summary: First line of its docstring.
        statements: In order.
        defined: Name -> number of the statement.
        imported: Name -> module of this package, and the name there.
        external: Name -> import statement.
        effects: Numbers of the statements that define nothing.
    """

    summary: str
    statements: list[_Statement] = field(default_factory=list)
    defined: dict[str, int] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    external: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    effects: list[int] = field(default_factory=list)


class _Bundle:
    """Definitions of several modules, with all that they need."""

    def __init__(self, stand_ins: Mapping[tuple[str, str], tuple[str, str, str]]) -> None:
        self.stand_ins = stand_ins
        self.modules: dict[str, _Module] = {}  # those below a module come before it
        self.taken: dict[str, set[int]] = {}
        self.owners: dict[str, str] = {}
        self.external: dict[str, tuple[str, str, str]] = {}

    def add(self, module_name: str, name: str) -> None:
        """Take the definition of a name, if the module has one, and what it needs."""
        module = self._module(module_name)
        if (module_name, name) in self.stand_ins:
            self.external[name] = self.stand_ins[module_name, name]
        elif name in module.imported:
            self.add(*module.imported[name])
        elif name in module.external:
            self._claim(name, str(module.external[name]))
            self.external[name] = module.external[name]
        elif name in module.defined:
            self._claim(name, module_name)
            self._take(module_name, module.defined[name])
        else:
            raise ValueError(f"{module_name} has no {name}.")

    def add_effects(self) -> None:
        """Take the statements that define nothing but whose names are all taken, such as registrations."""
        for module_name, module in self.modules.items():
            for number in module.effects:
                own = [name for name in module.statements[number].used if name in module.defined]
                if own and all(module.defined[name] in self.taken[module_name] for name in own):
                    self._take(module_name, number)

    def text(self) -> str:
        """Return imports and definitions, under the names of their modules."""
        parts = [_imports(self.external.values())]
        for name, module in self.modules.items():
            statements = [module.statements[number] for number in sorted(self.taken[name])]
            if not statements:
                continue
            parts.append(f"\n\n# {'-' * 20} {name.replace('.', '/')}.py\n# {module.summary}\n")
            before = True
            for statement in statements:
                parts.append("\n\n" * (before or statement.is_definition) + statement.text)
                before = statement.is_definition
        return "".join(parts)

    def _take(self, module_name: str, number: int) -> None:
        if number not in self.taken[module_name]:
            self.taken[module_name].add(number)
            module = self.modules[module_name]
            for name in sorted(module.statements[number].used):
                if name in module.defined or name in module.imported or name in module.external:
                    self.add(module_name, name)

    def _claim(self, name: str, owner: str) -> None:
        if self.owners.setdefault(name, owner) != owner:
            raise ValueError(f"{name} has two meanings, in {self.owners[name]} and {owner}: rename one of them.")

    def _module(self, name: str) -> _Module:
        if name not in self.modules:
            module = _read_module(name)
            for imported, _ in module.imported.values():
                self._module(imported)
            self.modules[name], self.taken[name] = module, set()
        return self.modules[name]


def _path_of(module: str) -> Path:
    path = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _read_module(name: str) -> _Module:
    path = _path_of(name)
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    module = _Module((ast.get_docstring(tree) or "").partition("\n")[0])
    left_out: set[str] = set()
    end = 0
    for node in tree.body:
        text, end = "".join(lines[end : node.end_lineno]).lstrip("\n"), node.end_lineno or 0
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            _read_import(node, package, module, left_out)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # the docstring
            for key, value in _entries(node):
                if isinstance(value, ast.Name) and value.id in left_out:
                    text = re.sub(
                        rf"\s*{re.escape(ast.get_source_segment(source, key) or '')}: {value.id},?", "", text
                    )
            names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            kinds = (ast.FunctionDef, ast.ClassDef)
            module.statements.append(_Statement(text, names - left_out, isinstance(node, kinds)))
            defined = list(_names_defined_by(node))
            module.defined.update(dict.fromkeys(defined, len(module.statements) - 1))
            if not defined:
                module.effects.append(len(module.statements) - 1)
    return module


def _read_import(node: ast.Import | ast.ImportFrom, package: list[str], module: _Module, left_out: set[str]) -> None:
    for alias in node.names:
        local = alias.asname or alias.name
        if isinstance(node, ast.Import):
            origin, _, name = alias.name.rpartition(".") if alias.asname else ("", "", alias.name)
            module.external[local.partition(".")[0]] = (origin, name, local)
        elif not node.level:
            module.external[local] = (str(node.module), alias.name, local)
        else:
            origin = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            if origin in LEFT_OUT:
                left_out.add(local)
            else:
                module.imported[local] = (origin, alias.name)


def _entries(node: ast.stmt) -> Iterator[tuple[Any, ast.expr]]:
    """Yield keys and values of a table, such as that of the backends."""
    value = getattr(node, "value", None)
    if isinstance(value, ast.Dict):
        yield from zip(value.keys, value.values, strict=True)


def _names_defined_by(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            yield from (name.id for name in names if isinstance(name, ast.Name))


def _imports(statements: Any) -> str:
    """Return import statements, sorted, with the names of one module together."""
    plain, names = [], {}
    for origin, name, local in statements:
        renamed = name if name == local else f"{name} as {local}"
        if origin:
            names.setdefault(origin, set()).add(renamed)
        else:
            plain.append(f"import {renamed}")
    lines = sorted(plain)
    for origin, found in sorted(names.items()):
        line = f"from {origin} import {', '.join(sorted(found))}"
        wrapped = f"from {origin} import (\n    {f',{chr(10)}    '.join(sorted(found))},\n)"
        lines.append(line if len(line) < 120 else wrapped)
    return "\n" + "\n".join(lines) + "\n"
