"""The whole tensors of a checkpoint, however many processes shared them: weights, averages, the optimizer's state."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..utils.files import require_space
from ..utils.fingerprint import differences
from ..utils.reading import WEIGHTS_ENDING, check_tensors, is_finite, read_json, read_tensors, shortened
from .checkpoint import complete_checkpoints
from .config import TrainingConfig
from .ema import WeightAverage
from .monitor import NonFiniteLossError
from .optimizer import initial_state
from .shards import copy_full, full_tensor

logger = logging.getLogger(__name__)


class BatchNormStatistics:
    """Running statistics of a model's batch norms, which forward passes change whether or not their step is made.

    Args:
        model: The model, without wrappers; if it has no batch norms, nothing is done.
        num_processes: Processes that train it, each with its own statistics.
    """

    def __init__(self, model: nn.Module, num_processes: int):
        self.model, self.num_processes = model, num_processes
        # torch's common base of its batch norms has no public name.
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.tensors = [buffer for norm in norms for buffer in norm.buffers()]
        self._remembered: list[torch.Tensor] = []

    def remember(self) -> None:
        """Keep a copy, before a step."""
        self._remembered = [tensor.clone() for tensor in self.tensors]

    def settle(self, finite: torch.Tensor) -> None:
        """Average over all processes, since only one of them saves the model, or put the copy back.

        Args:
            finite: Whether the step was made, of shape (): the NaN of one that was not would stay in the statistics.
        """
        if self.tensors and self.num_processes > 1:
            from timm.utils import distribute_bn

            distribute_bn(self.model, self.num_processes, reduce=True)
        for tensor, remembered in zip(self.tensors, self._remembered, strict=True):
            tensor.copy_(torch.where(finite, tensor, remembered))


OPTIMIZER_FILE, HEADS_FILE = "optimizer.safetensors", "heads.safetensors"
#: Entries that transformers adds to a config when it saves a model.
ADDED_BY_TRANSFORMERS = frozenset({"architectures", "dtype", "transformers_version"})


class TrainingState:
    """The tensors of a run, as they are saved and loaded.

    Weights and averages are folders of `save_pretrained`; the optimizer's state is a safetensors file with a tensor
    for each parameter and moment, by the parameter's name. They do not depend on how many processes wrote them or
    under which strategy: any number of processes resumes from them, under DDP, FSDP2 or alone.

    Args:
        name: Folder of the weights; those of averages append an underscore and a suffix.
        skeleton: The model without its weights, on the meta device.
        model: The model that is trained, without wrappers; its tensors may be sharded.
        optimizer: Its optimizer, without wrappers.
        averages: Its averages, by the suffix of their folders.
        heads: What the loss trains with it, not sharded.
    """

    def __init__(
        self,
        name: str,
        skeleton: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Mapping[str, WeightAverage],
        heads: nn.Module | None = None,
    ):
        self.skeleton, self.model, self.optimizer = skeleton, model, optimizer
        self.models = {name: model.state_dict()}
        self.models |= {f"{name}_{ending}": average.tensors for ending, average in averages.items()}
        self.heads = {} if heads is None else heads.state_dict(prefix="heads.")
        named = {**dict(model.named_parameters()), **(dict(heads.named_parameters("heads")) if heads else {})}
        names = {id(parameter): name for name, parameter in named.items()}
        self._trained = {
            names[id(parameter)]: (parameter, group["rule"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def save(self, folder: Path, is_main_process: bool = True) -> None:
        """Fill a folder; all processes gather, the main one writes.

        Raises:
            NonFiniteLossError: If a value is NaN or infinite, on all processes; names the tensor.
        """
        for name, tensors in self.models.items():
            gathered = gather(tensors, keep=is_main_process, require_finite=name)
            if is_main_process:
                module = copy.deepcopy(self.skeleton)
                module.load_state_dict(gathered, assign=True)
                module.save_pretrained(folder / name)
        state = {
            f"{name}.{key}": torch.as_tensor(value)
            for name, (parameter, rule) in self._trained.items()
            for key, value in (self.optimizer.state.get(parameter) or initial_state(rule, parameter)).items()
        }
        gathered = gather(state, keep=is_main_process, require_finite="optimizer")
        if is_main_process:
            save_file(gathered, folder / OPTIMIZER_FILE)
        if self.heads:
            gathered = gather(self.heads, keep=is_main_process, require_finite="heads")
            if is_main_process:
                save_file(gathered, folder / HEADS_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load what `save` wrote.

        Raises:
            OSError: If a file is missing.
            ValueError: If the folder's model has another config, with all that differs; or if a file is damaged, or
                its tensors are not exactly those of this run, by name, shape and type, or not finite.
        """
        for name, tensors in self.models.items():
            found = differences(_saved_config(folder / name, self.skeleton), config_of(self.skeleton))
            if found:
                raise ValueError(f"{folder / name} is another model: {'; '.join(found)}.")
            saved = _read_weights(folder / name)
            check_tensors(saved, tensors, str(folder / name))
            for key, tensor in tensors.items():
                copy_full(saved[key], tensor)
        if self.heads:
            saved = read_tensors(folder / HEADS_FILE)
            check_tensors(saved, self.heads, str(folder / HEADS_FILE))
            for key, tensor in self.heads.items():
                tensor.copy_(saved[key])
        saved = read_tensors(folder / OPTIMIZER_FILE)
        check_tensors(saved, self._expected_state(), str(folder / OPTIMIZER_FILE))
        for name, (parameter, rule) in self._trained.items():
            state = initial_state(rule, parameter)
            for key, value in state.items():
                if isinstance(value, torch.Tensor):  # spread over the processes as its parameter is
                    copy_full(saved[f"{name}.{key}"], value)
                else:
                    state[key] = saved[f"{name}.{key}"].item()
            self.optimizer.state[parameter] = state

    def check_space(self, config: TrainingConfig, step: int) -> None:
        """Refuse to train where the disk cannot hold the first checkpoint and the model; warn if it cannot hold all.

        Args:
            config: How often the run saves, and how many checkpoints it keeps.
            step: The step it starts from.

        Raises:
            OSError: If less is free than the first checkpoint and the model will take.
        """
        run, model, *averages = config.run, *map(_num_bytes, self.models.values())
        saves = _times_due(run.checkpointing_steps, step, run.max_train_steps)
        if not saves:
            return
        checkpoint = model + sum(averages) + _num_bytes(self._expected_state()) + _num_bytes(self.heads)
        require_space(config.output_dir, checkpoint + model, "A checkpoint and the model")
        there, limit = len(complete_checkpoints(config.output_dir)), run.checkpoints_total_limit
        # While a checkpoint is written, there is one more than are kept.
        most = there + saves if limit is None else min(there + saves, max(1, limit) + 1)
        snapshots = config.ema.ema_snapshot_steps and _times_due(
            config.ema.ema_snapshot_steps, step, run.max_train_steps
        )
        total = max(1, most - there) * checkpoint + model + snapshots * sum(averages)
        try:
            require_space(config.output_dir, total, "What this run will save")
        except OSError as error:
            logger.warning(
                "%s in %s. Make room, or set checkpoints_total_limit or ema_snapshot_steps.",
                error.strerror,
                config.output_dir,
            )

    def _expected_state(self) -> dict[str, torch.Tensor]:
        """Return tensors of the names, shapes and types of those in the optimizer's file, without values."""
        return {
            f"{name}.{key}": torch.as_tensor(value, device="meta")
            for name, (parameter, rule) in self._trained.items()
            for key, value in initial_state(
                rule, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            ).items()
        }


def gather(
    tensors: Mapping[str, torch.Tensor], keep: bool = True, require_finite: str | None = None
) -> dict[str, torch.Tensor]:
    """Gather whole tensors on the CPU.

    Args:
        tensors: By name, possibly sharded. All processes call this together.
        keep: Whether this process wants them; otherwise it only takes part.
        require_finite: What they are, if values that are NaN or infinite are to be refused.

    Raises:
        NonFiniteLossError: If a value is refused, on all processes; names the tensor.
    """
    gathered = {}
    for name, tensor in tensors.items():
        tensor = full_tensor(tensor.detach())
        if require_finite and not is_finite(tensor):
            raise NonFiniteLossError(
                f"{name} of {require_finite} has values that are NaN or infinite. Try a lower learning_rate or "
                "max_grad_norm, in another run with its own output_dir or with change_on_resume."
            )
        if keep:
            gathered[name] = tensor.cpu().contiguous()
    return gathered


def _times_due(interval: int, step: int, last_step: int) -> int:
    """Count the steps after `step` at which something is done every `interval` steps (0 for never) and at the end."""
    interval = interval or last_step
    return last_step // interval - step // interval + bool(last_step % interval) if step < last_step else 0


def _num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights in a folder of `save_pretrained`: large models' are several files.

    Raises:
        ValueError: If a file is damaged, or holds a tensor that another one holds too; names it.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"*{WEIGHTS_ENDING}")):
        more = read_tensors(path)
        twice = sorted(tensors.keys() & more.keys())
        if twice:
            raise ValueError(f"{path} does not belong there: another file has {shortened(twice)} too.")
        tensors |= more
    return tensors


def _saved_config(folder: Path, skeleton: nn.Module) -> dict[str, Any]:
    """Return the config in a folder, with defaults for what it lacks.

    Raises:
        ValueError: If a model of the skeleton's class cannot be built by it; names the file.
    """
    values = read_json(folder / "config.json")
    try:
        if not isinstance(skeleton.config, Mapping):  # a model of transformers
            return _comparable(type(skeleton.config).from_dict(values).to_dict())
        with torch.device("meta"):
            return config_of(type(skeleton).from_config(values))
    except Exception as error:  # whatever a model raises for values that it does not expect
        raise ValueError(f"{folder / 'config.json'} is not of a {type(skeleton).__name__}: {error}") from error


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the config of a model of diffusers or transformers."""
    return _comparable(dict(model.config) if isinstance(model.config, Mapping) else model.config.to_dict())


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in config.items() if not key.startswith("_") and key not in ADDED_BY_TRANSFORMERS
    }
