"""Fixtures of the attention's tests."""

import pytest
import torch


@pytest.fixture
def nan_in_new_memory():
    """Fill all new memory with NaN, and refuse operations whose results vary."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
