"""Test that converted models compute what the formulas of their repositories say."""

import itertools
import json

import diffusers
import pytest
import torch

from sdt_diffusion import SDTPipeline
from sdt_diffusion.convert.assemble import READERS, build_pipeline, describe, export, read_source
from sdt_diffusion.convert.facebook_dit import exact_ratio
from tests.convert.references import random_reference

ALL_OPTIONS = ("rotary", "swiglu", "rms", "qk_norm", "no_shift")
PUBLISHED = ("rotary", "swiglu", "rms")
#: Relative difference in fp32 that counts as equal.
EQUAL = 2e-6


@torch.no_grad()
def difference(reference, pipe, seed=0):
    """Return the relative difference of a converted model's outputs, in the conventions of this package."""
    generator = torch.Generator().manual_seed(seed)
    side = reference.side * reference.patch
    images = torch.randn(4, reference.channels, side, side, generator=generator)
    labels = torch.tensor([0, 3, 9, 10])  # 10 is the null class
    if reference.flow:
        sigma = torch.tensor([0.0, 0.013, 0.5, 1.0])
        timestep, expected = 1000 * sigma, -reference(images, 1 - sigma, labels)
    else:
        timestep = torch.tensor([0.0, 17.0, 500.0, 999.0])
        expected = reference(images, timestep, labels)
    output = pipe.transformer(images, timestep, labels).sample
    assert output.shape == expected.shape
    return ((output - expected).norm() / expected.norm()).item()


def convert(kind, reference, spatial_decay="context"):
    heads = reference.blocks[0].attn.heads
    return build_pipeline(READERS[kind](reference.state_dict(), heads), spatial_decay)


@pytest.mark.parametrize("spatial_decay", ["none", "context", "content", "raster"])
@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("dit", {}),
        ("dit", {"learn_sigma": False}),
        ("sit", {}),
        *(
            ("lightningdit", {"options": (option,), "learn_sigma": False})
            for option in ("rotary", "swiglu", "no_shift")
        ),
        ("lightningdit", {"options": ("rms", "qk_norm"), "patch": 1, "channels": 6}),
        ("lightningdit", {"options": ALL_OPTIONS, "learn_sigma": False}),
    ],
    ids=str,
)
def test_outputs_are_those_of_the_source_for_all_options_and_decays(kind, kwargs, spatial_decay):
    reference = random_reference(32, 2, 4, flow=kind != "dit", **kwargs)
    assert difference(reference, convert(kind, reference, spatial_decay)) < EQUAL


@pytest.mark.parametrize(
    ("kind", "size", "kwargs"),
    [
        ("dit", (384, 3, 6), {"side": 8}),
        ("sit", (384, 3, 6), {"side": 8}),
        ("lightningdit", (384, 3, 6), {"side": 8, "options": PUBLISHED, "learn_sigma": False}),
        ("dit", (1152, 1, 16), {}),
        ("sit", (1152, 1, 16), {}),
        ("lightningdit", (1152, 1, 16), {"patch": 1, "channels": 32, "options": PUBLISHED, "learn_sigma": False}),
    ],
    ids=str,
)
def test_outputs_are_those_of_the_source_at_published_widths(kind, size, kwargs):
    reference = random_reference(*size, flow=kind != "dit", **kwargs)
    pipe = build_pipeline(READERS[kind](reference.state_dict()))  # which knows the heads of published widths
    assert pipe.transformer.config.num_attention_heads == size[2]
    assert difference(reference, pipe) < EQUAL


def test_the_comparison_notices_a_time_that_runs_backwards_and_a_decay():
    reference = random_reference(32, 2, 4, flow=True)
    source = READERS["sit"](reference.state_dict(), 4)
    pipe = build_pipeline(source)
    assert difference(reference, pipe) < EQUAL
    for block in pipe.transformer.transformer_blocks:
        torch.nn.init.constant_(block.attn.gate.signed_alpha, 0.01)
    assert difference(reference, pipe) > 1e-4
    dit = build_pipeline(READERS["dit"](random_reference(32, 2, 4, learn_sigma=False).state_dict(), 4))
    assert difference(reference, dit) > 0.1


def test_dit_is_sampled_as_it_was_published():
    reference = random_reference(32, 1, 4)
    pipe = convert("dit", reference)
    config = pipe.scheduler.config
    assert isinstance(pipe.scheduler, diffusers.DDPMScheduler)
    assert (config.variance_type, config.timestep_spacing, config.clip_sample) == ("learned_range", "linspace", False)
    assert (config.beta_start, config.beta_end, config.num_train_timesteps) == (1e-4, 2e-2, 1000)
    assert pipe.config.num_inference_steps == 250
    pipe.scheduler.set_timesteps(50)
    assert pipe.scheduler.timesteps[:3].tolist() == [999, 979, 958]
    plain = convert("dit", random_reference(32, 1, 4, learn_sigma=False))
    assert plain.scheduler.config.variance_type == "fixed_large"


@pytest.mark.parametrize(("kind", "shift"), [("sit", 1.0), ("lightningdit", 0.3)])
def test_a_converted_flow_goes_from_noise_to_the_data_of_its_source(kind, shift, tmp_path):
    """Euler's method of SiT, dx = v dt with t from 0 to 1, ends where the pipeline ends; LightningDiT shifts t."""
    options = {"options": PUBLISHED, "learn_sigma": False} if kind == "lightningdit" else {}
    reference = random_reference(32, 2, 4, flow=True, **options)
    convert(kind, reference).save_pretrained(tmp_path)
    pipe = SDTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.num_inference_steps == 250
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 7])
    sampled = pipe(
        labels, latents=noise, num_inference_steps=5, guidance_scale=1.0, height=8, width=8, output_type="latent"
    ).images
    times = torch.linspace(0, 1, 6)
    times = shift * times / (1 + (shift - 1) * times)
    x = noise
    with torch.no_grad():
        for t, following in itertools.pairwise(times):
            x = x + (following - t) * reference(x, t.expand(2), labels)
    torch.testing.assert_close(sampled, x, rtol=1e-4, atol=1e-4)


def test_the_decay_is_absent_at_first_and_moves_by_the_learning_rate_a_step():
    reference = random_reference(32, 2, 4, flow=True, learn_sigma=False, side=6)
    model = convert("sit", reference).transformer.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        coarse = torch.randn(4, 4, 3, 3, generator=generator)
        clean = torch.nn.functional.interpolate(coarse, size=(12, 12), mode="bicubic")
        noise, sigma = torch.randn(clean.shape, generator=generator), torch.rand(4, 1, 1, 1, generator=generator)
        noised, labels = (1 - sigma) * clean + sigma * noise, torch.randint(0, 11, (4,), generator=generator)
        loss = (model(noised, 1000 * sigma.flatten(), labels).sample - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for block in model.transformer_blocks:
        gate = block.attn.gate
        assert gate.signed_alpha.abs().max() > 1e-4  # 1,000 times the start
        assert gate.proj.weight.abs().max() > 1e-4
        assert gate.conditioning_proj.weight.abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_a_model_without_decay_goes_back_to_the_layout_of_its_source(kind):
    reference = random_reference(32, 2, 4, flow=kind == "sit", learn_sigma=kind == "dit")
    pipe = convert(kind, reference, "none")
    exported = export(pipe, kind)
    assert exported.keys() == reference.state_dict().keys()
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(exported[name], expected, rtol=1e-6, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match="needs timestep_scale"):
        export(pipe, "sit" if kind == "dit" else "dit")
    with pytest.raises(ValueError, match="DiT has no spatial_decay context"):
        export(convert(kind, reference, "context"), kind)


def test_mlp_widths_survive_rounding():
    for width in (32, 48, 384, 768, 1152):
        for hidden in {int(2 / 3 * 4 * width), 4 * width, width + 1, 7 * width // 3}:
            assert int(width * exact_ratio(hidden, width)) == hidden


class TestDiffusers:
    @pytest.fixture
    def dit(self):
        torch.manual_seed(0)
        sizes = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "sample_size": 8}
        model = diffusers.DiTTransformer2DModel(**sizes, out_channels=8, num_embeds_ada_norm=10)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        return model.eval()

    @staticmethod
    def as_reference(dit):
        """Return facebookresearch/DiT's formulas with the weights of a model of diffusers."""
        reference = random_reference(32, 2, 4)
        pipe = convert("dit", reference, "none")
        weights = {}
        for name, value in dit.state_dict().items():
            weights[name.replace(".attn1.", ".attn.")] = value
            if ".norm1.emb." in name:
                part = name.partition(".norm1.emb.")[2].replace(".embedding_table", "")
                weights[f"time_class_embed.{part}"] = weights.pop(name)
        pipe.transformer.load_state_dict(weights)
        reference.load_state_dict(export(pipe, "dit"))
        return reference

    def test_facebooks_numerics_are_those_the_weights_were_trained_with(self, dit, tmp_path):
        dit.save_pretrained(tmp_path)
        pipe = build_pipeline(read_source(tmp_path))
        assert difference(self.as_reference(dit), pipe) < EQUAL

    @torch.no_grad()
    def test_diffusers_numerics_are_another_choice_and_the_outputs_differ(self, dit, tmp_path):
        dit.save_pretrained(tmp_path)
        images, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 9])
        for timestep in (torch.tensor([3.0, 40.0]), torch.tensor([500.0, 999.0])):
            expected = dit(images, timestep, labels).sample
            found = {}
            for numerics in ("facebook", "diffusers"):
                model = build_pipeline(read_source(tmp_path, numerics=numerics)).transformer
                found[numerics] = (model(images, timestep, labels).sample - expected).norm() / expected.norm()
            assert found["diffusers"] < 1e-5  # and not less: diffusers' second norm has another epsilon
            assert found["facebook"] > 1e-3

    def test_a_pipeline_brings_its_scheduler_vae_and_class_names(self, dit, tiny_vae, tmp_path):
        scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_start=1e-4, beta_end=0.02)
        names = {label: f"class {label}" for label in range(10)}
        diffusers.DiTPipeline(dit, tiny_vae, scheduler).save_pretrained(tmp_path)
        index = tmp_path / "model_index.json"  # published folders hold names, which diffusers reads but does not write
        index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))
        pipe = build_pipeline(read_source(tmp_path))
        assert pipe.id2label == names
        assert type(pipe.scheduler) is diffusers.DDIMScheduler
        for name, value in pipe.vae.state_dict().items():
            assert torch.equal(value, tiny_vae.state_dict()[name])
        pipe.save_pretrained(tmp_path / "saved")
        assert SDTPipeline.from_pretrained(tmp_path / "saved").id2label == names

    def test_blocks_with_embedders_of_their_own_are_refused(self, dit, tmp_path):
        torch.nn.init.zeros_(dit.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight)
        dit.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"transformer_blocks\.1 embeds timestep and class in its own way"):
            read_source(tmp_path)

    def test_other_transformers_are_refused(self, tmp_path, make_model):
        make_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a SDTTransformer2DModel, not a DiTTransformer2DModel"):
            read_source(tmp_path)


def test_one_line_says_what_the_tensors_tell():
    reference = random_reference(32, 2, 4, flow=True, learn_sigma=False, options=PUBLISHED)
    source = READERS["lightningdit"](reference.state_dict())
    assert describe(source, build_pipeline(source)) == (
        "LightningDiT: 2 blocks of width 32, 4 heads, patch_size 2, 4 channels of 8x8, 10 classes, norm_type rms, "
        "activation_fn swiglu, rotary, FlowMatchEulerDiscreteScheduler, spatial_decay context that starts as none"
    )
