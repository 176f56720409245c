"""What `SDTPipeline` loads and saves beside its parts: adapters (LoRA), and the code that a folder may carry."""

import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
from diffusers.loaders import CogVideoXLoraLoaderMixin

from ..utils.carried_code import CODE_PACKAGES, IN_PACKAGE, check_with_code
from ..utils.code_export import write_code
from ..utils.files import write_json
from ..utils.reading import read_json
from .schedulers import objective_of

#: Where model_index.json says that our classes are: the package to install, which errors without it name. Diffusers
#: itself would name the subpackage, as folders of 0.1 do.
LIBRARY, SUBPACKAGE = "sdt_diffusion", "sdt"


def objective_of_0_1(transformer: Any) -> dict[str, Any] | None:
    """Return what a transformer has learned that was loaded from a pipeline of 0.1, which noted no objective.

    The scheduler that was saved beside it knows, also if another one was given to `from_pretrained`.

    Returns:
        The objective; `None` for other transformers.
    """
    folder = Path(getattr(transformer, "config", {}).get("_name_or_path") or "").parent
    if not (folder / "model_index.json").is_file() or not (folder / "scheduler").is_dir():
        return None
    index = read_json(folder / "model_index.json")
    kind = index.get("scheduler")
    if index.get("objective") is not None or not isinstance(kind, list):
        return None
    return objective_of(getattr(diffusers, str(kind[-1])).from_pretrained(folder, subfolder="scheduler"))


class SDTLoaderMixin(CogVideoXLoraLoaderMixin):
    """Loads LoRAs of the transformer as diffusers' pipelines with one transformer do, and folders that carry code.

    `load_lora_weights`, `save_lora_weights`, `set_adapters`, `fuse_lora`, `unfuse_lora` and `unload_lora_weights` need
    peft (`pip install peft`). To be inherited from before `DiffusionPipeline`.
    """

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        # Through this diffusers reads every model_index.json, on the Hub too. Where this package is imported, its
        # classes stand for those that a folder carries.
        config = super()._dict_from_json_file(json_file)
        own = getattr(diffusers.pipelines, LIBRARY, None)
        if own is not None and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
            for part, value in config.items():
                if isinstance(value, list) and hasattr(own, str(value[-1])):
                    config[part] = [LIBRARY, value[-1]]
        return config

    def register_to_config(self, **kwargs: Any) -> None:
        """Note arguments and the classes of parts, as diffusers does; ours under the name of their package."""
        for name, value in kwargs.items():
            if isinstance(value, tuple) and value[:1] == (SUBPACKAGE,):
                kwargs[name] = (LIBRARY, *value[1:])
        super().register_to_config(**kwargs)

    def save_pretrained(self, save_directory, *args, with_code: bool = False, **kwargs):
        """Save the pipeline as diffusers does; one that was loaded from a folder's code takes the code along."""
        if with_code:
            check_with_code(self, kwargs.get("push_to_hub", False))
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory, "model_index.json")
        for name, part in {"_class_name": self, **self.components}.items():
            module = sys.modules[type(part).__module__]
            if module.__name__.startswith(CODE_PACKAGES):
                folder = path.parent if part is self else path.parent / name
                shutil.copy(str(module.__file__), folder)
                write_json(path, {**read_json(path), name: [Path(str(module.__file__)).stem, type(part).__name__]})
        if with_code and IN_PACKAGE:
            write_code(save_directory)
