import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sdt_diffusion import SDTPipeline, SDTTransformer2DModel
from sdt_diffusion.experiments.reach import measure_attention, recorded_distances
from sdt_diffusion.experiments.study import Evaluation

#: What of a run's arguments names its held-out images.
CONFIG = {"dataset": "digits", "held_out_images": 4, "held_out_dataset": None}


def build(spatial_decay="none", **changes):
    """A model of 4x4 patches whose attention depends on the decay alone: queries are zero."""
    torch.manual_seed(0)
    model = SDTTransformer2DModel(
        **{"sample_size": 8, "patch_size": 2, "in_channels": 1, "num_layers": 2, "num_attention_heads": 2},
        **{"attention_head_dim": 8, "num_classes": 10, "spatial_decay": spatial_decay, **changes},
    ).eval()
    for name, weights in model.named_parameters():
        if ".to_q." in name:
            torch.nn.init.zeros_(weights)
    return model


def distances_of(model, side=8):
    with torch.no_grad(), recorded_distances(model) as distances:
        model(torch.zeros(3, 1, side, side), timestep=torch.zeros(3), class_labels=torch.arange(3))
    return distances


def mean_distance(rows, columns):
    """The mean Manhattan distance of two patches, drawn with replacement: (n^2 - 1) / 3n along an axis of n."""
    return sum((n**2 - 1) / (3 * n) for n in (rows, columns))


def measured(model, folder):
    names = {label: str(label) for label in range(10)}
    SDTPipeline(model, FlowMatchEulerDiscreteScheduler(), id2label=names).save_pretrained(folder)
    return measure_attention(folder, CONFIG, Evaluation(attention_images=4, resolutions=[12]), "no")


def test_attention_to_all_alike_looks_as_far_as_patches_are_apart_on_average(tmp_path):
    found = measured(build(), tmp_path)
    for side, patches in (("8", 4), ("12", 6)):
        assert found[side] == [[pytest.approx(mean_distance(patches, patches), rel=1e-3)] * 2] * 2


def test_attention_that_decays_at_once_looks_at_the_patch_itself_on_any_grid(tmp_path):
    found = measured(build("fixed", decay_initial_value=1e-6, decay_heads_range=0.0), tmp_path)  # by 7e-7 a patch
    assert found == {side: [[pytest.approx(0, abs=1e-4)] * 2] * 2 for side in ("8", "12")}


def test_registers_are_at_distance_0_and_do_not_look():
    (first, _) = distances_of(build(num_registers=4))
    assert first.shape == (3, 2)
    torch.testing.assert_close(first, torch.full((3, 2), mean_distance(4, 4) * 16 / 20))


def test_the_model_computes_as_before_while_it_is_measured_and_afterward():
    model = build("context", rotary=True)
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "timestep": torch.ones(2),
        "class_labels": torch.ones(2).long(),
    }
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    with torch.no_grad():
        before, processors = model(**inputs).sample, list(model.attn_processors.values())
        with recorded_distances(model):
            torch.testing.assert_close(model(**inputs).sample, before)
    assert list(model.attn_processors.values()) == processors


def test_decomposed_attention_is_refused():
    with pytest.raises(ValueError, match="decomposed"):
        distances_of(build("context", decomposed=True))
