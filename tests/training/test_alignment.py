"""Alignment with an encoder's features: the term, and training with features of a cache or of the moment."""

import pytest
import torch
from datasets import ClassLabel
from safetensors.torch import load_file

from sdt_diffusion.data.latents import encode
from sdt_diffusion.training import train_dit
from sdt_diffusion.training.monitor import read_log
from sdt_diffusion.training.objectives import AlignmentLoss, DiffusionLoss, ObjectiveArguments, build_objective
from sdt_diffusion.training.objectives.auxiliary import on_grid
from tests.data.encoders import save_encoder
from tests.data.test_images import table
from tests.training.test_auxiliary import TokenModel, draws_for, predicted


class Source:
    """Features of 4 x 4 patches, which are the batch."""

    feature_shape = (4, 4, 3)

    def features(self, batch):
        return batch


def term(grid_size=(4, 4), **options):
    torch.manual_seed(0)
    return AlignmentLoss(0.5, 6, 1, grid_size, Source(), hidden_width=8, **options)


def values(features, num_tokens=16, **fields):
    tokens = torch.randn(len(features), num_tokens, 6, generator=torch.Generator().manual_seed(1))
    return predicted(torch.zeros(len(features), 1, 1, 1), batch=features, tokens={1: tokens}, **fields)


class TestAlignmentLoss:
    def test_is_minus_the_cosine_of_each_token(self):
        features, loss = torch.randn(2, 4, 4, 3), term()
        given = values(features)
        expected = 0.0
        for image in range(2):
            for token in range(16):
                a, b = loss.head(given.tokens[1])[image, token], features[image, token // 4, token % 4]
                expected -= (a @ b / (a.norm() * b.norm())).item() / 32
        assert loss(given).item() == pytest.approx(expected, abs=1e-6)
        assert loss(values(loss.head(given.tokens[1]).detach().unflatten(1, (4, 4)))).item() == pytest.approx(-1)

    def test_its_head_has_three_layers(self):
        assert [tuple(p.shape) for p in term().head.parameters()] == [(8, 6), (8,), (8, 8), (8,), (3, 8), (3,)]

    def test_features_come_to_the_grid_of_the_tokens(self):
        ramp = torch.arange(4.0)[None, :, None, None].expand(1, 4, 6, 3)
        assert torch.equal(on_grid(ramp, (4, 6)), ramp.flatten(1, 2))
        finer = on_grid(ramp, (8, 6)).unflatten(1, (8, 6))
        torch.testing.assert_close(finer[0, :, 0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
        coarser = on_grid(ramp, (2, 3)).unflatten(1, (2, 3))[0, :, 0, 0]
        # Weights 3, 3 and 1 of the nearest rows: nothing is left out.
        torch.testing.assert_close(coarser, torch.tensor([(0 * 3 + 1 * 3 + 2) / 7, (1 + 2 * 3 + 3 * 3) / 7]))

    def test_it_stops(self):
        loss, features = term(stop_step=3), torch.randn(2, 4, 4, 3)
        for step, there in ((0, True), (2, True), (3, False), (100, False)):
            draws = draws_for(2)
            draws.step = step
            assert (loss(values(features, draws=draws)) is not None) == there

    def test_a_step_without_it_has_the_loss_without_it(self):
        objective, clean = build_objective(ObjectiveArguments()), torch.randn(4, 2, 4, 4)
        without = DiffusionLoss(objective)(TokenModel(), clean, None, draws_for(4))
        stopped = DiffusionLoss(objective, auxiliary=[term(stop_step=0)])
        assert stopped(TokenModel(), clean, None, draws_for(4)) == without
        assert "alignment_loss" not in stopped.pop_values()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures, an encoder, and a VAE without random draws."""
    folder = tmp_path_factory.mktemp("alignment")
    table([i % 3 for i in range(10)], label=ClassLabel(names=["ant", "bee", "cat"])).to_parquet(folder / "x.parquet")
    save_encoder(folder / "encoder")
    return folder


ARGUMENTS = {
    "model": "SDT-digits",
    "model_overrides": '{"num_layers": 2, "patch_size": 2}',
    "train_batch_size": 4,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "logging_steps": 1,
    "num_validation_images": 3,
    "num_inference_steps": 1,
    "alignment_width": 8,
    "mixed_precision": "no",
    "report_to": "none",
    "random_flip": True,
}


def train(folder, name, dataset="x.parquet", **changes):
    """Train; return the log and the folder."""
    given = {"dataset": folder / dataset, "alignment_model": folder / "encoder", **ARGUMENTS, **changes}
    flags = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    train_dit.main([*flags, "--output_dir", str(folder / name)])
    return [record for record in read_log(folder / name) if "loss" in record], folder / name


def test_a_cache_trains_as_the_encoder_does(folder, tiny_vae):
    tiny_vae.save_pretrained(folder / "vae")
    names = ["--pretrained_vae_model_name_or_path", str(folder / "vae"), "--resolution", "16"]
    data = ["--dataset", str(folder / "x.parquet"), "--alignment_model", str(folder / "encoder")]
    encode.main([*names, *data, "--output_dir", str(folder / "cache"), "--dtype", "float32"])
    vae = {"pretrained_vae_model_name_or_path": folder / "vae", "resolution": 16}
    online, _ = train(folder, "online", **vae, held_out_images=2)
    cached, output = train(folder, "cached", "cache", held_out_images=2)
    assert len(cached) == len(online) == 4
    for key in ("loss", "alignment_loss"):
        assert [r[key] for r in cached] == pytest.approx([r[key] for r in online], abs=1e-3)
    saved = load_file(next((output / "transformer").glob("*.safetensors")))
    assert not any("alignment" in key for key in saved)


def test_a_resumed_run_ends_with_the_same_weights_and_head(folder):
    _, whole = train(folder, "whole", alignment_stop_step=3)
    log, parts = train(folder, "parts", alignment_stop_step=3, max_train_steps=2)
    assert "alignment_loss" in log[-1]
    (folder / "encoder").rename(folder / "moved")  # the encoder may move meanwhile
    try:
        resumed = {"alignment_model": folder / "moved", "resume_from_checkpoint": "latest"}
        log, _ = train(folder, "parts", alignment_stop_step=3, **resumed)
    finally:
        (folder / "moved").rename(folder / "encoder")
    assert ["alignment_loss" in record for record in log] == [True, True, True, False]
    for name in ("heads.safetensors", "optimizer.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        a, b = (load_file(output / "checkpoint-4" / name) for output in (whole, parts))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment_model": None}, "alignment_width needs alignment_model"),
        ({"alignment_block": 3}, "alignment_block 3 is beyond the model's num_layers, 2"),
        ({"alignment_weight": 0}, "alignment_weight must be more than 0"),
        ({"alignment_stop_step": 0}, "alignment_stop_step must be at least 1"),
        ({"alignment_layer": 9}, "gives no features of patches"),
        ({"alignment_model": "nowhere/at-all"}, "cannot be loaded as a vision encoder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(folder, capsys, changes, message):
    with pytest.raises(SystemExit) as caught:
        train(folder, "refused", **changes)
    assert message in f"{caught.value} {capsys.readouterr().err}"
    assert not (folder / "refused").exists()
