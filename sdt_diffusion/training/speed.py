"""How fast a run is: images and floating-point operations per second, and what the device could do at most."""

import math
import time
from dataclasses import dataclass

import psutil
import torch

#: Name of a CUDA device -> its peak, dense, in TFLOP/s: matrix products in bf16 or fp16 (with sums in fp32), in TF32,
#: and in fp32 without tensor cores. From NVIDIA's data sheets, which often state twice as much, for sparse matrices.
PEAK_TFLOPS: dict[str, tuple[float, float, float]] = {
    **dict.fromkeys(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
        (312, 156, 19.5),
    ),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H200"), (989, 494, 67)),
    "NVIDIA H100 PCIe": (756, 378, 51),
    **dict.fromkeys(("NVIDIA H100 NVL", "NVIDIA H200 NVL"), (835, 417, 60)),
    "NVIDIA B200": (2250, 1125, 75),
    "NVIDIA L40S": (362, 183, 91.6),
    "NVIDIA GeForce RTX 3090": (71, 35.6, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
}


def peak_tflops(device: torch.device, mixed_precision: str, allow_tf32: bool) -> float | None:
    """Return the peak of a device in the precision of its matrix products, in TFLOP/s; `None` if it is not known."""
    peaks = PEAK_TFLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peaks is None:
        return None
    half, tf32, single = peaks
    return half if mixed_precision != "no" else tf32 if allow_tf32 else single


def memory_gib(device: torch.device) -> float:
    """Return the memory of this process in GiB: the peak on CUDA, elsewhere what is resident now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


@dataclass(frozen=True)
class Work:
    """The work of a step.

    Args:
        images: Images of a step, over all processes.
        num_processes: Processes, each with a device of its own.
        flops_per_image: Floating-point operations of one image's forward pass, two a multiply-add; `None` if unknown.
        peak_tflops: What one device could do at most, in TFLOP/s; `None` if unknown.
    """

    images: int
    num_processes: int
    flops_per_image: float | None = None
    peak_tflops: float | None = None

    def speed(self, seconds_per_step: float) -> dict[str, float]:
        """Return images per second over all processes and, as far as they are known, TFLOP/s and MFU of one.

        A training step counts as three forward passes, as is usual: the backward pass multiplies twice as much. What
        is recomputed to save memory does not count. MFU (model FLOPs utilization; Chowdhery et al. 2022, "PaLM",
        appendix B) is the share of the peak.
        """
        images_per_second = self.images / seconds_per_step
        values = {"images_per_second": images_per_second}
        if self.flops_per_image is not None:
            values["tflops_per_second"] = 3 * self.flops_per_image * images_per_second / self.num_processes / 1e12
            if self.peak_tflops is not None:
                values["mfu"] = values["tflops_per_second"] / self.peak_tflops
        return values


class Window:
    """The steps since the last record: their losses, and the time they took."""

    def __init__(self):
        self._started = self._since = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        """Reset the sums, after a record."""
        self.steps, self.losses, self.norms, self.seconds = 0, [], [], 0.0

    def resume(self) -> None:
        """Start the clock again, after validation and checkpoint, whose time is not that of a step."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Count a step and stop the clock."""
        self.seconds += time.perf_counter() - self._since
        self.steps += 1

    def add(self, loss: float, norm: float) -> None:
        """Add the values of a step to the means, unless they are not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.losses.append(loss)
            self.norms.append(norm)

    @property
    def seconds_per_step(self) -> float:
        """Mean duration of the steps."""
        return self.seconds / self.steps

    @property
    def elapsed(self) -> float:
        """Seconds since this process began to train, with everything."""
        return time.perf_counter() - self._started

    def means(self) -> dict[str, float]:
        """Return the mean loss and gradient norm; nothing if no step was finite."""
        if not self.losses:
            return {}
        return {"loss": sum(self.losses) / len(self.losses), "grad_norm": sum(self.norms) / len(self.norms)}
