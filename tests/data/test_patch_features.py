"""Patch features are what transformers gives for the whole image, without the tokens of no patch."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from sdt_diffusion.data.patch_features import EncoderArguments, PatchEncoder
from tests.data.encoders import ENCODERS, MEAN, STD, save_encoder, save_processor, save_sdt_h


def images(side=16, channels=3):
    """Pixels of 8 bits, in -1 to 1."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, channels, side, side), generator=generator).float() / 127.5 - 1


def as_transformers(folder, pixels):
    """What the encoder's own image processor gives, without its crop."""
    pictures = [((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for image in pixels]
    processor = AutoImageProcessor.from_pretrained(folder)
    return processor(pictures, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("name", ENCODERS)
def test_they_are_the_tokens_of_the_patches_in_rows(tmp_path, name):
    folder = save_encoder(tmp_path, name)
    model = AutoModel.from_pretrained(folder)
    model = getattr(model, "vision_model", model).eval()
    encoder = PatchEncoder(folder)
    assert encoder.feature_shape == (4, 4, 16)
    with torch.no_grad():
        tokens = model(as_transformers(folder, images())).last_hidden_state
    features = encoder(images())
    torch.testing.assert_close(features.flatten(1, 2), tokens[:, ENCODERS[name][1] :], atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_an_image_of_another_size_is_resized_whole(tmp_path):
    encoder = PatchEncoder(save_encoder(tmp_path))
    small = encoder.prepare(images(8))
    assert small.shape == (2, 3, 16, 16)
    means = (small * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).mean((2, 3))
    torch.testing.assert_close(means, ((images(8) + 1) / 2).mean((2, 3)), atol=0.02, rtol=0)
    corner = images(8).clone()
    corner[..., 0, 0] += 1
    assert not torch.equal(encoder.prepare(corner)[..., 0, 0], small[..., 0, 0])  # a crop would have lost it


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
def test_another_resolution_has_another_grid(tmp_path, name):
    encoder = PatchEncoder(save_encoder(tmp_path, name), resolution=24)
    assert encoder.feature_shape == (6, 6, 16)


def test_layers_before_the_last(tmp_path):
    folder = save_encoder(tmp_path)
    with torch.no_grad():
        hidden = (
            AutoModel.from_pretrained(folder)
            .eval()(as_transformers(folder, images()), output_hidden_states=True)
            .hidden_states
        )
    for layer in (1, -2):
        found = PatchEncoder(folder, layer=layer)(images())
        torch.testing.assert_close(found.flatten(1, 2), hidden[layer][:, 1:], atol=1e-5, rtol=1e-4)


def test_feature_maps_of_sdt_h(tmp_path):
    folder = save_sdt_h(tmp_path)
    assert PatchEncoder(folder).feature_shape == (2, 2, 16)
    first = PatchEncoder(folder, layer=1)
    assert first.feature_shape == (4, 4, 8)
    with torch.no_grad():
        expected = (
            AutoModel.from_pretrained(folder)
            .eval()(as_transformers(folder, images()), output_hidden_states=True)
            .hidden_states[1]
        )
    torch.testing.assert_close(first(images()).permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-4)


def test_gray_images_are_shown_in_three_channels(tmp_path):
    encoder = PatchEncoder(save_encoder(tmp_path))
    gray = images(channels=1)
    assert torch.equal(encoder(gray), encoder(gray.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="takes images of 3 channels, not 4"):
        encoder(images(channels=4))


def test_settings_tell_encoders_apart_wherever_they_lie(tmp_path):
    first = PatchEncoder(save_encoder(tmp_path / "a"))
    assert PatchEncoder(save_encoder(tmp_path / "b")).settings() == first.settings()
    others = [
        PatchEncoder(save_encoder(tmp_path / "c", "registers")),
        PatchEncoder(save_encoder(tmp_path / "d", image_mean=[0.5, 0.5, 0.5])),
        PatchEncoder(first.name, layer=1),
        PatchEncoder(first.name, resolution=20),
    ]
    assert all(other.settings() != first.settings() for other in others)


class TestRefusals:
    def test_no_encoder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="cannot be loaded as a vision encoder"):
            PatchEncoder(str(tmp_path))

    def test_no_image_processor(self, tmp_path):
        folder = save_encoder(tmp_path)
        (tmp_path / "preprocessor_config.json").unlink()
        with pytest.raises((FileNotFoundError, ValueError), match="cannot be loaded as an image processor"):
            PatchEncoder(folder)

    def test_weights_that_are_missing_or_not_finite(self, tmp_path):
        folder = save_encoder(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        norm = weights.pop("layernorm.weight")
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"has no weights that fit for layernorm\.weight"):
            PatchEncoder(folder)
        save_file(weights | {"layernorm.weight": norm / 0}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"layernorm\.weight"):
            PatchEncoder(folder)

    @pytest.mark.parametrize(("options", "message"), [({"layer": 7}, "index out of range"), ({"resolution": 3}, "")])
    def test_layers_and_resolutions_that_there_are_not(self, tmp_path, options, message):
        folder = save_encoder(tmp_path)
        with pytest.raises(ValueError, match=rf"gives no features of patches for images of .*{message}"):
            PatchEncoder(folder, **options)

    def test_tokens_that_make_no_grid(self, tmp_path):
        folder = save_encoder(tmp_path)
        encoder = PatchEncoder(folder, resolution=20)
        with pytest.raises(ValueError, match="its 18 tokens for 20 pixels make no square grid"):
            encoder._on_grid(torch.zeros(1, 18, 16))

    def test_processors_that_do_not_fit(self, tmp_path):
        folder = save_encoder(tmp_path, crop_size={"height": 16, "width": 8})
        with pytest.raises(ValueError, match="makes no squares: give alignment_resolution"):
            PatchEncoder(folder)
        save_processor(tmp_path, image_mean=[0.5, 0.5])
        with pytest.raises(ValueError, match=r"image_mean .* do not fit images of 3 channels"):
            PatchEncoder(folder)
        save_processor(tmp_path, image_std=[0.5, 0.5, 0.0])
        with pytest.raises(ValueError, match=r"image_std .* do not fit"):
            PatchEncoder(folder)

    def test_options_without_an_encoder(self):
        for name in ("alignment_resolution", "alignment_layer"):
            with pytest.raises(ValueError, match=f"{name} needs alignment_model"):
                EncoderArguments(**{name: 1})
        assert EncoderArguments().load() is None

    def test_a_model_of_texts(self, tmp_path):
        folder = save_encoder(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
        with pytest.raises((FileNotFoundError, ValueError), match=r"vision encoder|no weights"):
            PatchEncoder(folder)
