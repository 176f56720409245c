"""Load pipelines and transformers for scripts, which trust neither the files nor the weights of a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers import DDPMScheduler
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open

from ..utils.reading import WEIGHTS_ENDING, check_finite, read_json
from .pipeline_sdt import SDTPipeline
from .schedulers import check_scheduler_config
from .transformer_sdt import SDTTransformer2DModel

#: Types of weights, in safetensors' names. diffusers converts others without a word.
FLOATING_TYPES = ("F64", "F32", "F16", "BF16")
#: Parts of a pipeline that have weights.
NETWORKS = ("transformer", "vae", "guide_transformer")


def open_pipeline(name: str, dtype: torch.dtype = torch.float32) -> SDTPipeline:
    """Load a pipeline.

    Args:
        name: Folder or Hub name.
        dtype: Type of the weights.

    Raises:
        ValueError: If it is damaged, of another kind, or has weights that are no finite floating-point numbers; says
            why.
    """
    path = Path(name).expanduser()
    where = str(path) if path.is_dir() else name

    def load():
        configs = ("model_index.json", "scheduler/scheduler_config.json", "guider/guider_config.json")
        for file in (path / config for config in configs):
            if path.is_dir() and file.exists():
                read_json(file, finite=False)  # names the file that is damaged; DPM-Solver's config holds -Infinity
        kind = SDTPipeline.load_config(where).get("_class_name")
        if kind != SDTPipeline.__name__:
            raise ValueError(f"it holds a {kind}, not an {SDTPipeline.__name__}.")
        check_scheduler_config(DDPMScheduler.load_config(where, subfolder="scheduler"))
        for part in NETWORKS:
            check_types(path / part)
        return SDTPipeline.from_pretrained(where, dtype=dtype)

    pipe = _or_refuse(name, load)
    if not isinstance(pipe.transformer, SDTTransformer2DModel) or pipe.scheduler is None:
        raise ValueError(f"{name} is not whole: its model_index.json names no SDTTransformer2DModel or no scheduler.")
    for part in NETWORKS:
        if getattr(pipe, part) is not None:
            check_finite(getattr(pipe, part).state_dict(), f"The {part} of {name}")
    return pipe


def open_transformer(name: str, dtype: torch.dtype = torch.float32) -> SDTTransformer2DModel:
    """Load a transformer; same arguments and errors as `open_pipeline`."""

    def load():
        check_types(Path(name))
        return SDTTransformer2DModel.from_pretrained(name, dtype=dtype)

    model = _or_refuse(name, load)
    check_finite(model.state_dict(), name)
    return model


@contextmanager
def without_reports() -> Iterator[None]:
    """Keep diffusers from printing lists of weights that are missing, which the errors of this package name."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def check_types(folder: Path) -> None:
    """Refuse weights that are not floating-point numbers, as a safetensors file of another program may hold.

    Raises:
        ValueError: Names the file and a tensor.
    """
    # Opening a named pipe would wait for a writer.
    for path in sorted(path for path in folder.glob(f"*{WEIGHTS_ENDING}") if path.is_file()):
        try:
            with safe_open(path, "pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (no dictionary)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for name, kind in types.items():
            if kind not in FLOATING_TYPES:
                raise ValueError(f"{name} in {path} is of type {kind}, not of {', '.join(FLOATING_TYPES)}.")


def _or_refuse(name: str, load: Callable[[], Any]) -> Any:
    try:
        with without_reports():
            return load()
    except Exception as error:  # diffusers and safetensors raise anything for files that are cut, changed or odd
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ValueError(f"{name} cannot be loaded: {reason}") from error
