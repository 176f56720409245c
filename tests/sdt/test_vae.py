import pytest
import torch

from sdt_diffusion.sdt.vae import (
    LatentNormalization,
    decode_latents,
    describe_vae,
    encode_pixels,
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
    assert posterior_moments(vae, pixels)[:, 1].abs().max() == 0
    assert decode_latents(vae, latents).shape == pixels.shape


def test_spatial_scale(tiny_vae):
    assert vae_spatial_scale(None) == 1
    assert vae_spatial_scale(tiny_vae) == 2
