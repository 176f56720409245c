import math

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from sdt_diffusion import SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.experiments.locality import measure_gates, measure_pruning
from sdt_diffusion.experiments.study import Evaluation

#: What of a run's arguments names its held-out images.
CONFIG = {"dataset": "digits", "held_out_images": 4, "held_out_dataset": None, "resolution": 32}
#: The exponent of RMT's start: attention falls by a factor of 1 - 2^-0.00001, about 7e-6, with each patch.
EXPONENT = 0.00001


@pytest.fixture
def saved(tmp_path):
    """A function that saves a pipeline of 16x16 patches with a decay that is strong and not trained."""

    def save(spatial_decay):
        model = SDTTransformer2DModel(
            **{"sample_size": 32, "patch_size": 2, "in_channels": 1, "num_layers": 2, "num_attention_heads": 2},
            **{"attention_head_dim": 8, "num_classes": 10, "spatial_decay": spatial_decay},
            **{"decay_initial_value": EXPONENT, "decay_heads_range": 0.0},
        )
        names = {label: str(label) for label in range(10)}
        SDTPipeline(model, FlowMatchEulerDiscreteScheduler(), id2label=names).save_pretrained(tmp_path / spatial_decay)
        return tmp_path / spatial_decay

    return save


def test_gates_of_a_new_model_are_rmts_at_every_noise_level_and_class(saved):
    found = measure_gates(saved("context"), CONFIG, Evaluation(gate_images=4), "no")
    rate = -math.log(1 - 2**-EXPONENT)
    assert len(found["by_noise"]) == 10
    assert 1 <= len(found["by_class"]) <= 4
    for rates in (*found["by_noise"].values(), *found["by_class"].values()):
        assert rates == [[pytest.approx(rate, rel=1e-3)] * 2] * 2


def test_pruning_a_strong_decay_skips_tiles_and_hardly_changes_the_error(saved):
    found = measure_pruning(saved("fixed"), CONFIG, Evaluation(prune_eps=[1e-2], pruning_images=4), "no")
    assert found["0.0"]["density"] == found["0.0"]["relative_time"] == 1
    assert found["0.01"]["density"] < 0.9
    assert found["0.01"]["held_out_loss"] == pytest.approx(found["0.0"]["held_out_loss"], rel=1e-3)


@pytest.mark.parametrize("measure", [measure_gates, measure_pruning])
def test_without_decay_there_is_nothing_to_measure(saved, measure):
    assert measure(saved("none"), CONFIG, Evaluation(gate_images=4, prune_eps=[1e-3]), "no") == {}
