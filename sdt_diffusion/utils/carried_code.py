"""Tell the package from the code that a folder carries, of which this module is a part; `code_export` writes it."""

from pathlib import Path

#: Whether this is the package, and not code that a folder carries.
IN_PACKAGE = __name__.startswith("sdt_diffusion.")
#: Packages of the classes that diffusers and transformers load from a folder's code.
CODE_PACKAGES = ("diffusers_modules.", "transformers_modules.")
#: Files of code beside a pipeline's or a classifier's config.
CODE_FILES = ("pipeline_sdt.py", "modeling_sdt_h.py", "probe.py")


def has_code(folder: Path | str) -> bool:
    """Return whether a folder carries the code of its model."""
    return any(Path(folder, name).is_file() for name in CODE_FILES)


def check_with_code(saved: object, push_to_hub: bool) -> None:
    """Refuse to save an object with its code where that cannot be, before anything is written.

    What diffusers and transformers loaded from a folder's code takes that along whenever it is saved.

    Args:
        saved: The pipeline or model.
        push_to_hub: Whether saving uploads, which it would do before the code is there.

    Raises:
        ValueError: Says what to do instead.
    """
    if push_to_hub:
        raise ValueError("with_code writes after push_to_hub has uploaded: save first, then `hf upload` the folder.")
    if not IN_PACKAGE and not type(saved).__module__.startswith(CODE_PACKAGES):
        raise ValueError(
            "with_code needs the package sdt_diffusion, or an object that from_pretrained(folder, "
            "trust_remote_code=True) has loaded."
        )
