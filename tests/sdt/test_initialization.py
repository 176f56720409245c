"""Test how diffusion transformers start."""

import pytest
import torch

from sdt_diffusion import SDTTransformer2DModel


def start(seed=0, **options):
    torch.manual_seed(seed)
    return SDTTransformer2DModel.from_preset("SDT-digits", num_layers=2, **options).state_dict()


@pytest.mark.parametrize(
    "options",
    [{"spatial_decay": "none"}, {"spatial_decay": "fixed"}, {"gate_conditioning": False}, {"num_registers": 2}],
    ids=str,
)
def test_models_that_differ_in_a_part_start_with_the_others_alike(options):
    one, other = start(), start(**options)
    shared = one.keys() & other.keys()
    assert {"transformer_blocks.1.attn.to_q.weight", "time_class_embed.class_embedder.weight"} <= shared
    assert [name for name in sorted(shared) if not torch.equal(one[name], other[name])] == []


def test_seeds_layers_and_models_of_one_seed_start_apart():
    torch.manual_seed(0)
    first = SDTTransformer2DModel.from_preset("SDT-digits", num_layers=2).state_dict()
    second = SDTTransformer2DModel.from_preset("SDT-digits", num_layers=2).state_dict()
    name = "transformer_blocks.{}.attn.to_q.weight"
    matrices = [first[name.format(0)], first[name.format(1)], second[name.format(0)], start(1)[name.format(0)]]
    assert all(not torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])
