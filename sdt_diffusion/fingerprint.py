"""Telling networks apart by their weights."""

import hashlib

import torch
from torch import nn


def fingerprint(*modules: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all names, types and values in the modules' state dicts."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
