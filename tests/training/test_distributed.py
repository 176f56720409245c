from types import SimpleNamespace

import pytest
import torch

from sdt_diffusion.training import distributed
from sdt_diffusion.training.config import RunArguments


@pytest.mark.parametrize(
    ("device", "bf16", "told", "expected"),
    [
        ("cuda", True, None, "bf16"),
        ("cuda", True, "no", "bf16"),
        ("cuda", True, "fp16", None),
        ("cuda", False, None, None),
        ("cpu", True, None, None),
        ("mps", True, None, None),
    ],
)
def test_bf16_is_the_default_where_an_accelerator_has_it(monkeypatch, device, bf16, told, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if told:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    monkeypatch.setattr(distributed, "is_bf16_available", lambda: True)  # counts what CUDA would only emulate
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    monkeypatch.setattr(distributed, "process_state", lambda: SimpleNamespace(device=torch.device(device)))
    assert distributed.default_precision() == expected


@pytest.mark.parametrize(("allowed", "precision"), [(True, "high"), (False, "highest")])
def test_tf32_is_used_where_it_is_allowed(tmp_path, allowed, precision):
    assert torch.get_float32_matmul_precision() == "highest"
    try:
        run = RunArguments(output_dir=str(tmp_path), allow_tf32=allowed, report_to="none", cpu_threads=1)
        distributed.build_accelerator(run)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
