"""Start a diffusion transformer from trained weights, also for other classes, resolutions, and with a decay added."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers import SchedulerMixin

from ..sdt import SDTTransformer2DModel
from ..sdt.class_names import labels_of_names
from ..sdt.schedulers import SHIFTS, is_flow, swap_scheduler
from ..utils.arguments import one_line
from ..utils.fingerprint import differences
from ..utils.ranges import check_value
from ..utils.reading import check_tensors, read_json, shortened
from .state import config_of

#: Value of `model` that means the architecture of `init_from`.
STORED = "stored"
#: Config keys that may differ: what only training does, the grid, whose positions are computed, a learned variance.
FREE_KEYS = ("class_dropout_prob", "dropout", "out_channels", "sample_size")
#: Config keys of the gates, which a model without decay gets.
DECAY_KEYS = ("spatial_decay", "decay_start", "decay_initial_value", "decay_heads_range", "gate_conditioning")
LAST_LAYER = ("proj_out_2.weight", "proj_out_2.bias")
CLASS_TABLE = "time_class_embed.class_embedder.weight"


def transformer_folder(init_from: str) -> Path:
    """Return the folder of the transformer that `init_from`, a pipeline's folder or a transformer's own, means.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(init_from).expanduser()
    if folder.is_file():
        raise FileNotFoundError(
            f"init_from {folder} is a file, and not the folder of a model: turn a checkpoint of DiT, SiT or "
            "LightningDiT into one by sdt-diffusion convert."
        )
    folder = folder / "transformer" if (folder / "model_index.json").is_file() else folder
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"init_from {folder} holds no SDT transformer (no config.json).")
    return folder


def stored_config(init_from: str) -> dict[str, Any]:
    """Return the config values that a folder stores.

    Raises:
        FileNotFoundError: If the folder holds no transformer.
        ValueError: If it is damaged, or that of another kind of model.
    """
    folder = transformer_folder(init_from)
    stored = read_json(folder / "config.json")
    if stored.get("_class_name") != SDTTransformer2DModel.__name__:
        raise ValueError(f"init_from {folder} holds a {stored.get('_class_name')}, not an SDT transformer.")
    return {key: value for key, value in stored.items() if not key.startswith("_")}


def adds_decay(stored: dict[str, Any], spatial_decay: str) -> bool:
    """Return whether a stored model without decay gets one."""
    return stored.get("spatial_decay") == "none" and spatial_decay != "none"


def load_weights(
    model: SDTTransformer2DModel, init_from: str, new_classes: bool = False, class_names: Sequence[str] = ()
) -> None:
    """Load the weights of a pipeline or transformer of the same architecture.

    Its grid may differ, as positions are computed, and a rotary embedding may be added. Gates, and outputs for a
    variance, that it does not have are left as they are; outputs for a variance that the model does not have are
    dropped.

    Args:
        model: The model, initialized.
        init_from: The folder, as `save_pretrained` wrote it.
        new_classes: Whether the classes may be others: rows of the class table go to the classes of the same name, the
            null class keeps its own, and the rows of other classes are left as they are.
        class_names: Names of the model's classes, for `new_classes`.

    Raises:
        FileNotFoundError: If the folder holds no SDT transformer.
        ValueError: If it is damaged, or of another architecture; lists what differs.
    """
    folder, stored = transformer_folder(init_from), stored_config(init_from)
    free = {*FREE_KEYS, *(("num_classes",) if new_classes else ())}
    if adds_decay(stored, model.config.spatial_decay):
        free |= set(DECAY_KEYS)
    if model.config.rotary and not stored.get("rotary"):
        free.add("rotary")  # which has no weights
    ours = {key: value for key, value in config_of(model).items() if key not in free}
    defaults = inspect.signature(SDTTransformer2DModel.__init__).parameters
    found = differences({key: stored.get(key, defaults[key].default) for key in ours}, ours)
    if found:
        raise ValueError(
            f"init_from {folder} is another model: {'; '.join(found)}. model {STORED} takes its architecture, and "
            "new_classes other classes."
        )
    try:
        loaded, info = SDTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # diffusers and safetensors raise their own for each kind of damage
        raise ValueError(f"init_from {folder} is damaged: {one_line(error)}") from error
    for names, what in ((info["missing_keys"], "no weights for"), (info["unexpected_keys"], "unknown weights")):
        if names:
            raise ValueError(f"init_from {folder} has {what} {shortened(sorted(names))}.")
    weights, initial = loaded.state_dict(), model.state_dict()
    check_tensors(weights, weights, f"init_from {folder}")  # all must be finite
    if new_classes:
        kept = kept_classes(init_from, class_names)
        weights[CLASS_TABLE] = new_class_table(weights[CLASS_TABLE], initial[CLASS_TABLE], kept)
    for name in LAST_LAYER:
        weights[name] = first_channels(weights[name], initial[name], loaded.out_channels, model.out_channels)
    model.load_state_dict({**initial, **weights})


def _stored_names(init_from: str) -> tuple[Path, dict[str, str]]:
    """Return the file of a stored pipeline's class names, and the names by label, if there are any."""
    index = Path(init_from).expanduser() / "model_index.json"
    return index, (read_json(index).get("id2label") or {}) if index.is_file() else {}


def kept_classes(init_from: str, class_names: Sequence[str]) -> dict[int, int]:
    """Return which classes a stored pipeline knows by their names: label now -> label there.

    A name may hold several words for a class, separated by commas, of which one that is the name of exactly one class
    there is enough. A folder of a transformer alone knows no names.

    Raises:
        ValueError: If the stored class names are damaged.
    """
    index, names = _stored_names(init_from)
    try:
        labels = labels_of_names({int(label): name for label, name in names.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is damaged: its id2label does not map labels to class names.") from error
    known = {name: ids[0] for name, ids in labels.items() if len(ids) == 1}
    kept = {}
    for label, name in enumerate(class_names):
        found = {known[word] for word in (name, *(word.strip() for word in name.split(","))) if word in known}
        if name in known:
            kept[label] = known[name]
        elif len(found) == 1:
            kept[label] = found.pop()
    return kept


def describe_classes(init_from: str, class_names: Sequence[str], new_classes: bool) -> str:
    """Return, in one line, which classes are new, or, without `new_classes`, which have other names there if any."""
    if not new_classes:
        _, stored = _stored_names(init_from)
        other = [name for label, name in enumerate(class_names) if stored.get(str(label), name) != name]
        if not other:
            return ""
        return (
            f"{init_from} has other names for {len(other)} of {len(class_names)} classes: {shortened(other)}. They "
            "start from the classes of the same numbers; new_classes starts them from those of the same names."
        )
    kept = kept_classes(init_from, class_names)
    new = [name for label, name in enumerate(class_names) if label not in kept]
    listed = f": {shortened(new)}." if new else "."
    return f"{len(kept)} of {len(class_names)} classes keep their rows of {init_from}, {len(new)} are new{listed}"


def describe_objective(init_from: str, objective: Mapping[str, Any]) -> str:
    """Return, in one line, that a stored model has learned to predict something else than it will; else nothing.

    A folder of a transformer alone does not tell.

    Args:
        init_from: The folder.
        objective: What the model is trained on now; see `SDTPipeline.objective`.
    """
    learned, now = _learned(init_from), objective["prediction_type"]
    if learned in (None, now):
        return ""
    options = "objective flow" if learned == "flow_prediction" else f"objective ddpm and prediction_type {learned}"
    return (
        f"{init_from} has learned {learned}, and is trained on {now} from here, which its outputs do not fit at "
        f"first; {options} goes on with what it has learned."
    )


def _learned(init_from: str) -> str | None:
    """Return the prediction type of a stored pipeline, if the folder tells."""
    index = Path(init_from).expanduser() / "model_index.json"
    stored = read_json(index).get("objective") if index.is_file() else None
    return stored.get("prediction_type") if isinstance(stored, dict) else None


def stored_shift(init_from: str) -> float | None:
    """Return the shift of the noise levels at which a stored pipeline samples a flow; `None` for other folders.

    Raises:
        ValueError: If the folder's scheduler is damaged.
    """
    path = Path(init_from).expanduser() / "scheduler" / "scheduler_config.json"
    if _learned(init_from) != "flow_prediction" or not path.is_file():
        return None
    config = read_json(path, finite=False)  # DPM-Solver's config holds -Infinity
    shift = config.get("shift", config.get("flow_shift", 1.0))
    check_value(f"The shift of {path}", shift, (float,), SHIFTS)
    return shift


def keep_shift(scheduler: SchedulerMixin, init_from: str) -> tuple[SchedulerMixin, str]:
    """Give a scheduler of flows the shift with which a stored pipeline samples, such as that of LightningDiT.

    Returns:
        The scheduler, and a line that says what was done; nothing if there is nothing to keep.
    """
    shift = stored_shift(init_from) if is_flow(scheduler) else None
    if shift is None or shift == scheduler.config.shift:
        return scheduler, ""
    line = (
        f"Samples keep the shift {shift:g} of {init_from}, and training draws unshifted times: time_shift "
        'shifts both, scheduler_options {"shift": 1} neither.'
    )
    return swap_scheduler(scheduler, type(scheduler).__name__, shift=shift), line


@torch.no_grad()
def new_class_table(stored: torch.Tensor, initial: torch.Tensor, kept: dict[int, int]) -> torch.Tensor:
    """Return the class table of other classes, shape (classes + 1, dim); its last row is the null class.

    Args:
        stored: The table of the stored model, shape (its classes + 1, dim).
        initial: The table of the new model, for classes that the stored one does not know.
        kept: Label now -> label there, see `kept_classes`.
    """
    table = initial.clone()
    table[-1] = stored[-1]
    for label, row in kept.items():
        table[label] = stored[row]
    return table


def first_channels(stored: torch.Tensor, initial: torch.Tensor, num_stored: int, num_channels: int) -> torch.Tensor:
    """Return the last layer's weights or biases for other output channels, of which the first are the stored.

    Args:
        stored: The stored model's, shape (patch area * num_stored, ...).
        initial: The new model's, shape (patch area * num_channels, ...), for channels that the stored one lacks.
        num_stored: Output channels of the stored model.
        num_channels: Output channels of the new model.
    """
    result = initial.clone().unflatten(0, (-1, num_channels))
    count = min(num_stored, num_channels)
    result[:, :count] = stored.unflatten(0, (-1, num_stored))[:, :count]
    return result.flatten(0, 1)
