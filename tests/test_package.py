"""Test the package as it is imported, built and installed."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sdt_diffusion

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sdt_diffusion"
#: Names of packages that are not imported by their own name.
IMPORT_NAMES = {"clean-fid": "cleanfid", "pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
SCRIPTS = sorted(path for folder in ("train", "sample", "eval") for path in (ROOT / folder).glob("*.py"))


def run(code, **kwargs):
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_registers_the_classes_with_diffusers():
    run(
        "import sdt_diffusion, diffusers\n"
        "assert diffusers.SDTPipeline is sdt_diffusion.SDTPipeline\n"
        "assert diffusers.SDTTransformer2DModel is sdt_diffusion.SDTTransformer2DModel\n"
        "assert diffusers.pipelines.sdt.SDTPipeline is sdt_diffusion.SDTPipeline\n"
    )


def test_swap_scheduler_is_public():
    import sdt_diffusion
    from sdt_diffusion.sdt import schedulers

    assert sdt_diffusion.swap_scheduler is schedulers.swap_scheduler
    assert "swap_scheduler" in sdt_diffusion.__all__


def test_import_brings_nothing_that_diffusers_pipelines_do_not():
    imported = "print('\\n'.join(sorted(m.split('.')[0] for m in set(sys.modules))))"
    before = set(run(f"import sys, torch\nfrom diffusers import DiffusionPipeline, ModelMixin\n{imported}").split())
    after = set(run(f"import sys, sdt_diffusion\n{imported}").split())
    assert after - before <= {"sdt_diffusion"}


def test_attention_needs_torch_only():
    code = (
        "import sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('attention', r'{PACKAGE}/attention/__init__.py')\n"
        "module = u.module_from_spec(spec)\n"
        "sys.modules['attention'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    run(code)


def test_all_files_name_one_version():
    patterns = {"pyproject.toml": r'^version = "(.+)"$', "CITATION.cff": r"^version: (.+)$"}
    versions = {name: re.search(pattern, (ROOT / name).read_text(), re.M)[1] for name, pattern in patterns.items()}
    assert versions == dict.fromkeys(patterns, sdt_diffusion.__version__)
    assert f"\n## {sdt_diffusion.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def wheel_contents(tmp_path_factory):
    """Build the wheel from a copy of its sources, and return the folder it is unpacked to."""
    source, unpacked = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("unpacked")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "sdt_diffusion", ignore=shutil.ignore_patterns("__pycache__"))
    run("from setuptools import build_meta; build_meta.build_wheel('dist')", cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def metadata_of(wheel_contents):
    (folder,) = wheel_contents.glob("*.dist-info")
    return importlib.metadata.PathDistribution(folder)


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel_contents):
    installed = {path.relative_to(wheel_contents) for path in wheel_contents.rglob("*") if path.is_file()}
    installed = {path for path in installed if not path.parts[0].endswith(".dist-info")}
    sources = {path.relative_to(ROOT) for pattern in ("*.py", "*.yaml", "py.typed") for path in PACKAGE.rglob(pattern)}
    assert installed == sources


def test_the_wheel_requires_what_the_package_imports_and_nothing_else(wheel_contents):
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    requirements = [text for text in metadata_of(wheel_contents).requires if "extra ==" not in text]
    names = [re.match(r"[\w-]+", text)[0] for text in requirements]
    required = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    required -= {"tensorboard"}  # accelerate imports it, for the default tracker
    # torch brings triton where it exists, and the others are extras; what uses them checks for them.
    imported -= {"triton", "xformers", "gradio", "bitsandbytes"}
    assert imported - set(sys.stdlib_module_names) - {"sdt_diffusion"} == required


def test_every_script_has_a_command_of_its_name_that_calls_the_same_function(wheel_contents):
    expected = {"sdt-diffusion": "sdt_diffusion.commands:main"}
    for path in SCRIPTS:
        imported = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom))
        expected[f"sdt-{path.stem.replace('_', '-')}"] = f"{imported.module}:main"
    assert {command.name: command.value for command in metadata_of(wheel_contents).entry_points} == expected


def test_every_command_of_the_wheel_shows_its_help_outside_the_checkout(wheel_contents, tmp_path):
    values = [command.value for command in metadata_of(wheel_contents).entry_points]
    code = (
        "import importlib, sdt_diffusion\n"
        f"assert sdt_diffusion.__file__.startswith({str(wheel_contents)!r}), sdt_diffusion.__file__\n"
        f"for value in {values}:\n"
        "    module, name = value.split(':')\n"
        "    try:\n"
        "        getattr(importlib.import_module(module), name)(['--help'])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, value\n"
        "    else:\n"
        "        raise AssertionError(f'{value} went on after --help')\n"
    )
    shown = run(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(wheel_contents)})
    assert shown.count("usage: ") == len(values)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_module_with_a_command_also_runs_as_a_module(script):
    """So that `accelerate launch -m sdt_diffusion.training.train_dit` starts processes of an installed package."""
    imported = next(node for node in ast.parse(script.read_text()).body if isinstance(node, ast.ImportFrom))
    module = ast.parse((ROOT / f"{imported.module.replace('.', '/')}.py").read_text())
    assert ast.unparse(module.body[-1]) == "if __name__ == '__main__':\n    main()"
