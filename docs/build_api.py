"""Build the API reference from the docstrings, with pdoc.

    pip install -e ".[docs]" && python docs/build_api.py

writes docs/api/index.html.
"""

import pkgutil
import warnings
from pathlib import Path

import pdoc

import sdt_diffusion


def main() -> None:
    """Write a page for every module."""
    # pdoc skips the submodules of a package with an `__all__`, so all of them are named; those of others come twice.
    warnings.filterwarnings("ignore", message="The module specification")
    modules = [module.name for module in pkgutil.walk_packages(sdt_diffusion.__path__, "sdt_diffusion.")]
    pdoc.render.configure(docformat="google", footer_text=f"sdt_diffusion {sdt_diffusion.__version__}")
    pdoc.pdoc("sdt_diffusion", *modules, output_directory=Path(__file__).parent / "api")


if __name__ == "__main__":
    main()
