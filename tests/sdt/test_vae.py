from typing import ClassVar

import pytest
import torch

from sdt_diffusion.sdt.vae import (
    LatentNormalization,
    check_images_fit,
    decode_latents,
    describe_vae,
    encode_pixels,
    latent_shape,
    posterior_moments,
    sample_posterior,
    vae_spatial_scale,
)


def test_encoding_samples_the_posterior_scaled_and_shifted(tiny_vae):
    pixels = torch.rand(64, 3, 16, 16) * 2 - 1
    posterior = tiny_vae.encode(pixels).latent_dist
    latents = encode_pixels(tiny_vae, pixels, torch.randn(64, 4, 8, 8))
    normalized = (latents / 0.5 + 0.25 - posterior.mean) / posterior.std
    assert latents.shape == (64, 4, 8, 8)
    assert abs(normalized.mean().item()) < 0.05
    assert abs(normalized.std().item() - 1) < 0.05


def test_moments_are_of_the_posterior_and_sampled_with_given_noise(tiny_vae):
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    posterior = tiny_vae.encode(pixels).latent_dist
    moments = posterior_moments(tiny_vae, pixels)
    torch.testing.assert_close(moments, torch.stack([posterior.mean, posterior.std], 1))
    noise = torch.randn(3, 4, 8, 8)
    normalization = LatentNormalization.of(tiny_vae)
    expected = (posterior.mean + posterior.std * noise - 0.25) * 0.5
    torch.testing.assert_close(sample_posterior(moments, noise, normalization), expected)
    torch.testing.assert_close(sample_posterior(moments, None, normalization), (posterior.mean - 0.25) * 0.5)
    torch.testing.assert_close(encode_pixels(tiny_vae, pixels), (posterior.mean - 0.25) * 0.5)


def test_a_normalization_is_undone(tiny_vae):
    latents = torch.randn(5)
    normalization = LatentNormalization(scaling_factor=0.2, shift_factor=3.0)
    torch.testing.assert_close(normalization.apply(latents), (latents - 3) * 0.2)
    torch.testing.assert_close(normalization.undo(normalization.apply(latents)), latents)


def test_decoding_undoes_the_normalization(tiny_vae):
    latents = torch.randn(2, 4, 8, 8)
    normalized = (latents - 0.25) * 0.5
    torch.testing.assert_close(decode_latents(tiny_vae, normalized), tiny_vae.decode(latents).sample)


def test_channels_may_have_statistics_of_their_own(tiny_vae, tmp_path):
    mean, std = torch.tensor([0.1, -0.2, 0.3, 2.0]), torch.tensor([0.5, 1.0, 2.0, 0.1])
    described = describe_vae(tiny_vae)
    LatentNormalization((1 / std).tolist(), mean.tolist()).register_with(tiny_vae)
    assert describe_vae(tiny_vae) == described
    tiny_vae.save_pretrained(tmp_path)
    vae = type(tiny_vae).from_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    z = vae.encode(pixels).latent_dist.mean
    normalized = (z - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(encode_pixels(vae, pixels), normalized)
    torch.testing.assert_close(decode_latents(vae, normalized), vae.decode(z).sample)
    LatentNormalization(0.5, 0.25).register_with(vae)
    assert LatentNormalization.of(vae) == (0.5, 0.25)


@pytest.mark.parametrize(
    "std", [[1.0, 1.0], [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, float("nan")], "four", [1, 1, 1, "a"]]
)
def test_statistics_that_are_not_of_the_channels_are_refused(tiny_vae, std):
    tiny_vae.register_to_config(latents_mean=[0.0] * 4, latents_std=std)
    with pytest.raises(ValueError, match="The VAE's latents_std must be"):
        LatentNormalization.of(tiny_vae)


def test_deep_compression_autoencoders_are_deterministic_and_scale_as_they_say(tiny_dc_vae):
    vae = tiny_dc_vae
    pixels = torch.rand(1, 3, 16, 16)
    latents = encode_pixels(vae, pixels)
    assert 16 // latents.shape[-1] == vae_spatial_scale(vae)
    torch.testing.assert_close(latents, vae.encode(pixels).latent * 0.5)
    assert posterior_moments(vae, pixels).shape == (1, 1, 4, 8, 8)
    assert decode_latents(vae, latents).shape == pixels.shape


def test_spatial_scale(tiny_vae):
    assert vae_spatial_scale(None) == 1
    assert vae_spatial_scale(tiny_vae) == 2


class TestRepresentationAutoencoder:
    def test_pixels_are_scaled_and_latents_normalized_once(self, tiny_rae):
        pixels = torch.rand(2, 3, 16, 16) * 2 - 1
        latents = encode_pixels(tiny_rae, pixels)
        torch.testing.assert_close(latents, tiny_rae.encode((pixels + 1) / 2).latent)
        assert latents.shape == (2, *latent_shape(tiny_rae, 16)) == (2, 64, 4, 4)

    def test_a_round_trip_is_the_autoencoders_own(self, tiny_rae):
        pixels = torch.rand(2, 3, 16, 16) * 2 - 1
        own = 2 * tiny_rae((pixels + 1) / 2).sample - 1
        torch.testing.assert_close(decode_latents(tiny_rae, encode_pixels(tiny_rae, pixels)), own)

    def test_its_scale_and_statistics_are_part_of_it(self, tiny_rae):
        described = describe_vae(tiny_rae)
        assert LatentNormalization.of(tiny_rae) == (1, 0)
        LatentNormalization(1.0, 0.0).register_with(tiny_rae)
        assert describe_vae(tiny_rae) == described
        tiny_rae.register_to_config(latents_std=None, scaling_factor=0.5)
        assert describe_vae(tiny_rae) != described

    def test_the_scale_of_another_vae_is_refused(self, tiny_rae):
        with pytest.raises(ValueError, match=r"AutoencoderRAE normalizes .* scaling_factor 0\.18215 and the shift_fa"):
            LatentNormalization(0.18215).register_with(tiny_rae)
        tiny_rae.register_to_config(scaling_factor=0.18215)
        with pytest.raises(ValueError, match=r"divides its latents by latents_std, and scaling_factor 0\.18215 would"):
            check_images_fit(tiny_rae, 16, "RGB")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"latents_mean": [0.0] * 64}, r"latents_mean must be of shape \(64, 1, 1\) or \(64, 4, 4\), not \(64,\)"),
            ({"latents_std": [[[1.0]]]}, r"latents_std must be of shape .* not \(1, 1, 1\)"),
            ({"latents_std": None, "scaling_factor": float("nan")}, "scaling_factor must be"),
            ({"reshape_to_2d": False}, "reshape_to_2d must be true"),
        ],
    )
    def test_a_config_that_makes_no_latents_is_refused(self, tiny_rae, change, message):
        tiny_rae.register_to_config(**change)
        with pytest.raises(ValueError, match=message):
            check_images_fit(tiny_rae, 16, "RGB")

    def test_images_of_another_size_are_refused(self, tiny_rae, make_pipe, make_model):
        with pytest.raises(ValueError, match="resolution 32 is not 16, that of all images of the VAE"):
            check_images_fit(tiny_rae, 32, "RGB")
        pipe = make_pipe(transformer=make_model(in_channels=64, sample_size=4), vae=tiny_rae)
        assert pipe(0, num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)
        with pytest.raises(ValueError, match="makes images of 16x16 only, not of 32x16"):
            pipe(0, height=32)


def test_a_vae_of_another_kind_is_refused(make_pipe, make_model):
    class OtherVAE(torch.nn.Module):
        config: ClassVar = {"latent_channels": 4}
        decode = None

    with pytest.raises(ValueError, match=r"must be one of AutoencoderKL, .*, not an OtherVAE"):
        make_pipe(transformer=make_model(in_channels=4), vae=OtherVAE())
