"""Config keys that change the architecture: each alone, with each decay, and against what it must equal."""

import math
import re
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.attention import SPATIAL_DECAY_VARIANTS
from sdt_diffusion.attention_processor import _rotate
from sdt_diffusion.convert.facebook_dit import write_dit
from sdt_diffusion.sdt import PRESETS
from sdt_diffusion.sdt.model_output import flow_of_clean
from sdt_diffusion.sdt.presets import PLUS, SIZES
from tests.conftest import TINY, randomize

OPTIONS = [
    {"norm_type": "rms"},
    {"activation_fn": "swiglu", "mlp_ratio": 8 / 3},
    {"qk_norm": "rms_norm"},
    {"rotary": True},
    {"position_embedding": "none"},
    {"adaln": "single"},
    {"adaln": "low_rank", "adaln_rank": 4},
    {"num_registers": 3, "rotary": True, "local_position_kernel_size": 3},
    {"long_skips": True, "num_layers": 4},
    {"network_output": "clean"},
    {"interval_conditioning": True},
    {"head_layers": 2, "head_width": 48},
    {**PLUS, "adaln": "single", "num_registers": 2, "network_output": "clean"},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))


def batch(size=(8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, *size, generator=generator), torch.tensor([10.0, 900.0]), torch.tensor([1, 4])


@pytest.fixture
def untrained():
    def build(**overrides):
        torch.manual_seed(0)
        return SDTTransformer2DModel(**{**TINY, **overrides}).eval()

    return build


def parameters(name, **overrides):
    with torch.device("meta"):
        return SDTTransformer2DModel.from_preset(name, **overrides).num_parameters()


class TestEveryOption:
    @each_option
    @pytest.mark.parametrize("variant", SPATIAL_DECAY_VARIANTS)
    def test_trains_every_parameter_with_every_decay(self, make_model, options, variant):
        model = make_model(**options, spatial_decay=variant)
        model(*batch()).sample.square().sum().backward()
        idle = () if "qk_norm" in options else ("attn.to_k.bias",)  # all keys share it, so the softmax cancels it
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert name.endswith(idle) or parameter.grad.abs().max() > 0, name

    @each_option
    def test_is_saved_and_works_on_other_grids(self, make_model, options, tmp_path):
        model = make_model(**options)
        model.save_pretrained(tmp_path)
        loaded = SDTTransformer2DModel.from_pretrained(tmp_path)
        with torch.no_grad():
            for size in ((8, 8), (4, 12)):
                output = model(*batch(size)).sample
                assert output.shape == (2, 3, *size)
                assert torch.equal(loaded(*batch(size)).sample, output)

    @pytest.mark.parametrize(
        ("variant", "options"),
        [
            ("content", {**PLUS, "adaln": "single", "network_output": "clean", "position_embedding": "none"}),
            ("raster", {"adaln": "low_rank", "num_registers": 2, "local_position_kernel_size": 3}),
            ("fixed", {"long_skips": True, "num_layers": 3, "interval_conditioning": True}),
            ("context", {"rotary": True, "num_registers": 2, "head_layers": 2, "head_width": 48}),
        ],
        ids=("plus", "registers", "skips", "head"),
    )
    def test_compiles_to_one_graph_and_checkpointing_changes_no_gradient(self, make_model, options, variant):
        torch.compiler.reset()
        model = make_model(**options, spatial_decay=variant)
        compiled, results = torch.compile(model, fullgraph=True, backend="eager"), []
        for forward, checkpointing in ((model, False), (model, True), (compiled, False)):
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
            model.zero_grad()
            output, (tokens,) = forward(*batch(), return_dict=False, block_outputs=(1,))
            (output.square().sum() + tokens.sum()).backward()
            results.append([output.detach(), tokens.detach(), *(p.grad.clone() for p in model.parameters())])
        for others in results[1:]:
            for expected, found in zip(results[0], others, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    @each_option
    def test_works_in_half_precision_and_with_weights_of_8_bits(self, make_model, options):
        images, timestep, labels = batch()
        model = make_model(**options)
        with torch.no_grad():
            expected = model(images, timestep, labels).sample
            model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
            assert (model(images, timestep, labels).sample - expected).norm() < 0.3 * expected.norm()
            half = make_model(**options).to(torch.bfloat16)(images.bfloat16(), timestep, labels).sample
        assert half.dtype == torch.bfloat16
        assert half.isfinite().all()

    @each_option
    def test_is_no_dit_or_is_one_by_name(self, make_model, options):
        model = make_model(**options, spatial_decay="none")
        key = "mlp_ratio" if "mlp_ratio" in options else next(iter(options))
        with pytest.raises(ValueError, match=f"DiT has no .*{'activation_fn' if key == 'mlp_ratio' else key}"):
            write_dit(model, model.state_dict())


def test_tokens_stay_contiguous_from_block_to_block(make_model):
    """Norms and linears are slow on the strides of images, which sums and RMSNorm hand on."""
    outputs = make_model(**PLUS)(*batch(), block_outputs=(0, 1)).block_outputs
    assert all(tokens.is_contiguous() for tokens in outputs)


class TestRotary:
    def test_complex_numbers_turn_as_pairs_of_real_ones(self, make_model):
        turns = make_model(rotary=True)._rotary_embedding((4, 4), "cpu")
        results = []
        for rotate in (_rotate, lambda x, *turns: apply_rotary_emb(x, turns, sequence_dim=1)):
            x = torch.randn(2, 16, 3, 3 * 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
            query = x.chunk(3, dim=-1)[1]  # with strides of fused projections
            output = rotate(query, *turns)
            output.pow(3).sum().backward()
            results.append((output, x.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class TestStarts:
    """What an untrained model of an option equals."""

    @pytest.mark.parametrize("options", [{"adaln": "full"}, {"adaln": "single"}, {"adaln": "low_rank"}], ids=str)
    def test_every_adaln_starts_with_blocks_that_do_nothing(self, untrained, options):
        model = untrained(**options)
        outputs = model(*batch(), block_outputs=(0, 1)).block_outputs
        tokens = model.pos_embed(batch()[0])
        assert all(torch.equal(output, tokens) for output in outputs)
        assert torch.equal(model(*batch()).sample, torch.zeros(2, 3, 8, 8))

    def test_long_skips_start_as_a_model_without(self, untrained, make_model):
        model, plain = (make_model(num_layers=5, long_skips=skips) for skips in (True, False))
        start = untrained(num_layers=5, long_skips=True).skip_projections.state_dict()
        model.load_state_dict({**plain.state_dict(), **{f"skip_projections.{k}": v for k, v in start.items()}})
        assert len(model.skip_projections) == 2
        torch.testing.assert_close(model(*batch()).sample, plain(*batch()).sample)

    def test_intervals_start_as_a_model_without(self, untrained, make_model):
        model, plain = make_model(interval_conditioning=True), make_model()
        start = untrained(interval_conditioning=True).state_dict()
        start = {name: value for name, value in start.items() if "interval_embedder" in name}
        model.load_state_dict({**plain.state_dict(), **start})
        expected = plain(*batch()).sample
        assert torch.equal(model(*batch(), end_timestep=torch.tensor([0.0, 300.0])).sample, expected)
        randomize(model.time_class_embed.interval_embedder)
        assert not torch.allclose(model(*batch(), end_timestep=torch.tensor(0.0)).sample, expected)
        now = model(*batch(), end_timestep=batch()[1]).sample
        assert torch.equal(model(*batch()).sample, now)  # the flow itself

    def test_options_that_are_off_add_no_weights(self, untrained):
        names = set(untrained().state_dict())
        assert not [
            name for name in names if any(part in name for part in ("skip", "shared", "interval", "registers"))
        ]
        assert set(untrained(position_embedding="none", network_output="clean").state_dict()) == names


class TestAdaLN:
    @pytest.mark.parametrize("adaln", ["single", "low_rank"])
    def test_equals_the_full_matrices_that_it_factors(self, make_model, adaln):
        """W c + b_l and W c + B_l A_l c are W_l c of matrices that are written out."""
        model, full = make_model(adaln=adaln, adaln_rank=4), make_model()
        weights = {name: value for name, value in model.state_dict().items() if name in full.state_dict()}
        shared = model.shared_modulation
        for i, block in enumerate(model.transformer_blocks):
            own = block.norm1
            matrix, bias = (
                (0, own.table) if adaln == "single" else (own.linear.weight @ own.down.weight, own.linear.bias)
            )
            weights[f"transformer_blocks.{i}.norm1.linear.weight"] = shared.weight + matrix
            weights[f"transformer_blocks.{i}.norm1.linear.bias"] = shared.bias + bias
        full.load_state_dict(weights)
        torch.testing.assert_close(model(*batch()).sample, full(*batch()).sample, rtol=1e-4, atol=1e-5)

    def test_saves_parameters(self):
        full, low_rank, single = (parameters("SDT-S/2", adaln=adaln) for adaln in ("full", "low_rank", "single"))
        width, layers = 384, 12
        matrix = 6 * width * width + 6 * width
        assert full - single == layers * matrix - matrix - layers * 6 * width
        assert low_rank - single == layers * 64 * (width + 6 * width)


class TestRegisters:
    def test_their_rows_are_not_rotated_and_not_returned(self, make_model):
        model = make_model(num_registers=3, rotary=True)
        cosines, sines = model._rotary_embedding((4, 4), "cpu")
        plain = make_model(rotary=True)._rotary_embedding((4, 4), "cpu")
        assert torch.equal(cosines[:3], torch.ones(3, 16))
        assert torch.equal(sines[:3], torch.zeros(3, 16))
        assert torch.equal(cosines[3:], plain[0])
        assert torch.equal(sines[3:], plain[1])
        (tokens,) = model(*batch(), block_outputs=[0]).block_outputs
        assert tokens.shape == (2, 16, 32)

    def test_they_are_in_the_attention_and_the_local_position_is_of_patches(self, make_model):
        model = make_model(num_registers=3, local_position_kernel_size=3)
        expected = model(*batch()).sample
        with torch.no_grad():
            model.pos_embed.registers[1] += 1
        assert not torch.allclose(model(*batch()).sample, expected)

    def test_they_are_refused_by_rows_and_columns(self):
        with pytest.raises(ValueError, match="num_registers 2 are in no row or column: set decomposed to false"):
            SDTTransformer2DModel(**TINY, num_registers=2, decomposed=True)


class TestNetworkOutput:
    def test_a_perfect_clean_image_gives_the_flow_and_less_of_it_below_the_least_sigma(self):
        clean, noise = torch.randn(2, 5, 3, 4, 4).double()
        sigma = torch.tensor([0.0, 0.01, 0.05, 0.5, 1.0]).double()
        noised = torch.lerp(clean, noise, sigma[:, None, None, None])
        factor = torch.tensor([0.0, 0.2, 1.0, 1.0, 1.0]).double()[:, None, None, None]
        flow = flow_of_clean(clean, noised, 1000 * sigma)
        torch.testing.assert_close(flow, factor * (noise - clean), rtol=1e-6, atol=1e-6)

    def test_the_model_returns_the_flow_of_its_output(self, make_model):
        model, plain = make_model(network_output="clean"), make_model()
        images, timestep, labels = batch()
        expected = (images - plain(images, timestep, labels).sample) / torch.tensor([0.05, 0.9])[:, None, None, None]
        torch.testing.assert_close(model(images, timestep, labels).sample, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images, timestep, labels).sample.dtype == torch.float32

    def test_schedulers_of_noise_do_not_fit_it(self, make_model, make_pipe):
        from diffusers import DDIMScheduler

        pipe = make_pipe(DDIMScheduler(), transformer=make_model(network_output="clean"))
        with pytest.raises(ValueError, match=r"network_output 'clean'.*DDIMScheduler"):
            pipe([1], num_inference_steps=1)
        images = make_pipe(transformer=pipe.transformer)([1], num_inference_steps=2, output_type="pt").images
        assert images.isfinite().all()

    def test_it_learns_no_variance(self):
        with pytest.raises(
            ValueError, match="network_output 'clean' needs as many out_channels as in_channels, 3, not 6"
        ):
            SDTTransformer2DModel(**TINY, network_output="clean", out_channels=6)


class TestBlockOutputs:
    def test_are_what_the_blocks_return_in_the_order_asked_for(self, make_model):
        model, seen = make_model(num_layers=3), []
        for block in model.transformer_blocks:
            block.register_forward_hook(lambda module, args, output: seen.append(output))
        output = model(*batch(), block_outputs=(2, 0))
        assert [torch.equal(*pair) for pair in zip(output.block_outputs, (seen[2], seen[0]), strict=True)] == [
            True
        ] * 2
        sample, tokens = model(*batch(), return_dict=False, block_outputs=[1])
        assert torch.equal(sample, output.sample)
        assert torch.equal(tokens[0], seen[1])

    def test_without_them_nothing_else_is_returned(self, make_model):
        model = make_model()
        assert len(model(*batch(), return_dict=False)) == 1
        assert list(model(*batch())) == ["sample"]

    @pytest.mark.parametrize("blocks", [(2,), (-1,), (0.0,), (True,), 1])
    def test_blocks_that_do_not_exist_are_refused(self, make_model, blocks):
        with pytest.raises(ValueError, match=r"block_outputs must be a list|must be one of 0\.\.1 of this model"):
            make_model()(*batch(), block_outputs=blocks)


class TestPresets:
    @pytest.mark.parametrize("size", SIZES)
    def test_plus_changes_parameters_by_less_than_a_thousandth(self, size):
        plain = parameters(f"SDT-{size}/2")
        assert abs(parameters(f"SDT-{size}/2+") - plain) < 1e-3 * plain

    @pytest.mark.parametrize("size", SIZES)
    def test_swiglu_has_lightning_dits_width(self, size):
        config = SIZES[size]
        width = config["num_attention_heads"] * config["attention_head_dim"]
        with torch.device("meta"):
            block = SDTTransformer2DModel.from_preset(f"SDT-{size}/1+", num_layers=1).transformer_blocks[0]
        assert isinstance(block.ff.net[2], nn.Linear)
        assert block.ff.net[2].in_features == int(2 / 3 * int(4 * width))

    def test_there_are_patches_of_every_size_and_pixels_for_the_largest(self):
        assert {f"SDT-S/{patch}{plus}" for patch in (1, 2, 4, 8, 16) for plus in ("", "+")} <= set(PRESETS)
        assert PRESETS["SDT-B/16+"]["network_output"] == "clean"
        assert math.isclose(PRESETS["SDT-B/16+"]["mlp_ratio"], 8 / 3)
        assert all(PRESETS[name[:-1]].items() <= config.items() for name, config in PRESETS.items() if name[-1] == "+")


class TestPage:
    """docs/model.md."""

    PAGE = (Path(__file__).parents[2] / "docs" / "model.md").read_text()

    def test_its_code_runs(self):
        namespace = {}
        for code in re.findall(r"```python\n(.*?)```", self.PAGE, re.DOTALL):
            exec(code, namespace)

    def test_its_keys_are_those_of_the_config_with_their_defaults(self, untrained):
        rows = re.findall(r"^\| `(\w+)` \| `?([\w-]+)`?", self.PAGE, re.MULTILINE)
        assert len(rows) == 11
        assert {key: str(untrained().config[key]) for key, _ in rows} == dict(rows)

    @pytest.mark.parametrize(("column", "size"), [(0, "S"), (3, "XL")])
    def test_its_numbers_of_parameters_are_counted(self, column, size):
        rows = re.findall(r"^\| `SDT-\*/(2\+?)`(?:, `adaln` (\w+))? \| (.*) \|$", self.PAGE, re.MULTILINE)
        assert len(rows) == 4
        for preset, adaln, numbers in rows:
            counted = parameters(f"SDT-{size}/{preset}", adaln=adaln or "full") / 1e6
            assert f"{counted:.1f}" == numbers.split(" | ")[column]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaln": "half"}, "adaln must be full or single or low_rank, not 'half'"),
        ({"adaln": ["full"]}, "adaln must be"),
        ({"adaln_rank": 0}, "adaln_rank must be at least 1"),
        ({"num_registers": -1}, "num_registers must be at least 0"),
        ({"num_registers": 1.5}, "num_registers must be a whole number"),
        ({"position_embedding": None}, "position_embedding must be sincos or none, not None"),
        ({"position_embedding": "none", "pos_embed_scaling": "ntk"}, "pos_embed_scaling is 'ntk', but position_emb"),
        ({"network_output": "noise"}, "network_output must be prediction or clean, not 'noise'"),
        ({"long_skips": "yes"}, "long_skips must be true or false"),
        ({"interval_conditioning": 2}, "interval_conditioning must be true or false"),
    ],
)
def test_values_that_no_option_has_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SDTTransformer2DModel(**TINY, **options)


def test_calls_that_do_not_fit_the_options_are_refused(make_model):
    with pytest.raises(ValueError, match="end_timestep needs a model with interval_conditioning"):
        make_model()(*batch(), end_timestep=torch.tensor(0.0))
    with pytest.raises(ValueError, match="adaln 'full' takes no shared modulation"):
        make_model().transformer_blocks[0](
            torch.randn(1, 16, 32), (4, 4), torch.randn(1, 32), None, None, torch.ones(1)
        )
    with pytest.raises(ValueError, match="adaln 'single' takes a shared modulation"):
        make_model(adaln="single").transformer_blocks[0](torch.randn(1, 16, 32), (4, 4), torch.randn(1, 32))
    with pytest.raises(ValueError, match="long_skips takes no cache"):
        make_model(long_skips=True).enable_cache(None)
