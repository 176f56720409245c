"""What `SDTPipeline` loads and saves beside its parts: adapters (LoRA), and the code that a folder may carry."""

import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
from diffusers.loaders import CogVideoXLoraLoaderMixin

from ..utils.files import write_json
from ..utils.reading import read_json

#: Package of the classes that diffusers loads from a folder's code.
CODE_PACKAGE = "diffusers_modules."


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
        own = getattr(diffusers.pipelines, "sdt", None)
        if own is not None and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
            for part, value in config.items():
                if isinstance(value, list) and hasattr(own, str(value[-1])):
                    config[part] = ["sdt", value[-1]]
        return config

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the pipeline as diffusers does; one that was loaded from a folder's code takes the code along."""
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory, "model_index.json")
        for name, part in {"_class_name": self, **self.components}.items():
            module = sys.modules[type(part).__module__]
            if module.__name__.startswith(CODE_PACKAGE):
                folder = path.parent if part is self else path.parent / name
                shutil.copy(str(module.__file__), folder)
                write_json(path, {**read_json(path), name: [Path(str(module.__file__)).stem, type(part).__name__]})
