"""Running statistics of batch norms, which forward passes change, whether or not their step is made."""

from torch import nn


class RunningStatistics:
    """Of a model's batch norms; of most models there are none, and nothing is done.

    Args:
        model: The model, under no wrapper.
        num_processes: How many train it, each with statistics of its own.
    """

    def __init__(self, model: nn.Module, num_processes: int):
        self.model, self.num_processes = model, num_processes
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.tensors = [buffer for norm in norms for buffer in norm.buffers()]
        self._kept = []

    def keep(self) -> None:
        """Remembers them before a step."""
        self._kept = [tensor.clone() for tensor in self.tensors]

    def restore(self) -> None:
        """Puts back what was kept: a step that is left out must not leave its NaN here for ever."""
        for tensor, kept in zip(self.tensors, self._kept, strict=True):
            tensor.copy_(kept)

    def average(self) -> None:
        """Makes them those of all processes: only one of them saves the model."""
        if self.tensors and self.num_processes > 1:
            from timm.utils import distribute_bn

            distribute_bn(self.model, self.num_processes, reduce=True)
