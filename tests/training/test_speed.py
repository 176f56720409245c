import pytest
import torch

from sdt_diffusion.training import speed
from sdt_diffusion.training.speed import PEAK_TFLOPS, Work, peak_tflops


def test_a_training_step_counts_as_three_forward_passes_of_each_image():
    work = Work(images=256, num_processes=4, flops_per_image=1e12, peak_tflops=400)
    values = work.speed(seconds_per_step=2.0)
    assert values == {"images_per_second": 128, "tflops_per_second": 3 * 128 / 4, "mfu": pytest.approx(0.24)}


def test_what_is_not_known_is_not_reported():
    assert Work(8, 1).speed(0.5) == {"images_per_second": 16}
    assert "mfu" not in Work(8, 1, flops_per_image=1e9).speed(0.5)


@pytest.mark.parametrize(
    ("name", "precision", "allow_tf32", "expected"),
    [
        ("NVIDIA H200", "bf16", False, 989),
        ("NVIDIA H200", "no", True, 494),
        ("NVIDIA H200", "no", False, 67),
        ("NVIDIA H200 MIG 1g.18gb", "bf16", False, None),
    ],
)
def test_the_peak_is_that_of_the_whole_device_in_the_precision_of_the_run(
    monkeypatch, name, precision, allow_tf32, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda"), precision, allow_tf32) == expected


def test_a_cpu_has_no_known_peak():
    assert peak_tflops(torch.device("cpu"), "bf16", False) is None


def test_lower_precision_is_faster_on_every_device():
    assert all(half >= tf32 >= single > 0 for half, tf32, single in PEAK_TFLOPS.values())


def test_the_means_leave_out_what_is_not_finite(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    window = speed.Window()
    for loss, norm in ((1.0, 2.0), (torch.nan, 1.0), (3.0, torch.inf), (2.0, 4.0)):
        window.resume()
        window.add(loss, norm)
        window.pause()
    assert window.means() == {"loss": 1.5, "grad_norm": 3.0}
    assert window.seconds_per_step == 1
    window.reset()
    assert window.means() == {}
