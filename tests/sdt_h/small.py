import torch

from sdt_diffusion.classification import SDTHConfig, SDTHForImageClassification, SDTHNetwork
from tests.conftest import randomize

SMALL = {
    "hidden_sizes": (16, 32, 32),
    "depths": (1, 2, 1),
    "num_attention_heads": (2, 2, 4),
    "mlp_ratios": (2, 3, 3),
    "decomposed": (True, False, False),
    "decay_heads_ranges": (4, 4, 6),
    "layer_scale_init_values": (None, None, 1e-6),
    "head_hidden_size": 40,
}


def small_network(**overrides):
    """A small network with all parameters and statistics off their start."""
    torch.manual_seed(0)
    network = randomize(SDTHNetwork(**{**SMALL, "num_labels": 5, **overrides}), std=0.2)
    network.train()(images(num=4, channels=network.num_channels))  # running statistics
    return network.eval()


def small_model(**overrides):
    """A small transformers model around such a network."""
    config = SDTHConfig(**{**SMALL, "num_labels": 5, **overrides})
    model = SDTHForImageClassification(config)
    model.network = small_network(**config.network_config())
    return model.eval()


def images(num=2, size=(64, 64), channels=3, seed=0):
    return torch.randn(num, channels, *size, generator=torch.Generator().manual_seed(seed))
