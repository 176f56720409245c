"""The tensors of a checkpoint: weights, averages and AdamW's moments, whole, however many processes shared them."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..utils.fingerprint import differences
from .distributed import copy_full, full_tensor
from .ema import WeightAverage


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

    def restore(self) -> None:
        """Put the copy back, after a step that was skipped: its NaN would stay in the statistics."""
        for tensor, remembered in zip(self.tensors, self._remembered, strict=True):
            tensor.copy_(remembered)

    def average(self) -> None:
        """Average over all processes, since only one of them saves the model."""
        if self.tensors and self.num_processes > 1:
            from timm.utils import distribute_bn

            distribute_bn(self.model, self.num_processes, reduce=True)


OPTIMIZER_FILE = "optimizer.safetensors"
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
    """

    def __init__(
        self,
        name: str,
        skeleton: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Mapping[str, WeightAverage],
    ):
        self.skeleton, self.model, self.optimizer = skeleton, model, optimizer
        self.models = {name: model.state_dict()}
        self.models |= {f"{name}_{ending}": average.tensors for ending, average in averages.items()}
        self._parameter_names = {id(parameter): name for name, parameter in model.named_parameters()}

    def save(self, folder: Path, is_main_process: bool = True) -> None:
        """Fill a folder; all processes gather, the main one writes."""
        for name, tensors in self.models.items():
            gathered = gather(tensors, keep=is_main_process)
            if is_main_process:
                module = copy.deepcopy(self.skeleton)
                module.load_state_dict(gathered, assign=True)
                module.save_pretrained(folder / name)
        moments = {
            f"{self._parameter_names[id(parameter)]}.{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        gathered = gather(moments, keep=is_main_process)
        if is_main_process:
            save_file(gathered, folder / OPTIMIZER_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load what `save` wrote.

        Raises:
            ValueError: If the folder's model has another config; lists what differs.
        """
        for name, tensors in self.models.items():
            module = type(self.skeleton).from_pretrained(folder / name)
            found = differences(config_of(module), config_of(self.skeleton))
            if found:
                raise ValueError(f"{folder / name} is another model: {'; '.join(found)}.")
            saved = module.state_dict()
            for key, tensor in tensors.items():
                copy_full(saved[key], tensor)
        saved = load_file(folder / OPTIMIZER_FILE)
        state = self.optimizer.state_dict()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state["state"] = {
            index: _moments(saved, f"{self._parameter_names[id(parameter)]}.", parameter)
            for index, parameter in enumerate(parameters)
        }
        self.optimizer.load_state_dict(state)


def gather(tensors: Mapping[str, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
    """Gather whole tensors on the CPU; processes that do not keep them only take part."""
    gathered = {}
    for name, tensor in tensors.items():
        tensor = full_tensor(tensor.detach())
        if keep:
            gathered[name] = tensor.cpu().contiguous()
    return gathered


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the config of a model of diffusers or transformers."""
    config = dict(model.config) if isinstance(model.config, Mapping) else model.config.to_dict()
    return {
        key: value for key, value in config.items() if not key.startswith("_") and key not in ADDED_BY_TRANSFORMERS
    }


def _moments(saved, prefix, parameter):
    moments = {}
    for name in [name for name in saved if name.startswith(prefix)]:
        tensor, key = saved[name], name.removeprefix(prefix)
        moments[key] = tensor
        if key != "step":  # a moment: spread over the processes as its parameter is
            moments[key] = torch.zeros_like(parameter, requires_grad=False)
            copy_full(tensor, moments[key])
    return moments
