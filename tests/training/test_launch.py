from types import SimpleNamespace

import pytest
import torch

from sdt_diffusion.training import launch


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
    monkeypatch.setattr(launch, "is_bf16_available", lambda: bf16)
    monkeypatch.setattr(launch, "PartialState", lambda cpu: SimpleNamespace(device=torch.device(device)))
    assert launch.default_precision() == expected
