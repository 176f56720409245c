"""Fixtures of the attention's tests."""

import pytest
import torch


@pytest.fixture
def strict_memory():
    """Make new tensors where the kernels run, a GPU if there is one; what no one has written to them is NaN.

    Operations whose results vary are refused; on a GPU they are warned of, as torch counts all its matrix products.
    """
    on_gpu = torch.cuda.is_available()
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    torch.set_default_device("cuda" if on_gpu else "cpu")
    yield
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
