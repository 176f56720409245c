"""Patches that skip blocks: those that go on attend by their true places, and the others stay as they are."""

import pytest
import torch
import torch.nn.functional as F

from sdt_diffusion.attention import BACKENDS, spatial_decay, spatial_decay_attention
from sdt_diffusion.attention.dispatch import WITHOUT_PLACES, choose_backend
from sdt_diffusion.sdt import TokenRoute

GRID, PLACES = (3, 4), torch.tensor([0, 3, 4, 9, 11])
TESTED = [name for name in BACKENDS if name not in (*WITHOUT_PLACES, "xformers")]  # whose mask is the reference's
ROUTE = TokenRoute(torch.tensor([0, 2, 5, 7, 8, 15]), 1, 3)
VARIANTS = ("context", "fixed", "content", "none")
#: Backend and variant. `factored` refuses `content`, as tests/attention/test_factored.py shows.
COMPUTED = [
    (backend, variant)
    for backend in (*TESTED, None)
    for variant in VARIANTS
    if (backend, variant) != ("factored", "content")
]


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([100.0, 900.0]), torch.tensor([1, 5])


def inputs(tokens):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 2, tokens, 8, generator=generator) for _ in range(3)]
    gate = F.logsigmoid(torch.randn(2, 2, tokens, generator=generator))
    return [x.requires_grad_() for x in (*tensors, gate, torch.tensor([0.7, 1.3]))]


class TestAttention:
    @pytest.mark.parametrize(("backend", "variant"), COMPUTED)
    @pytest.mark.parametrize("registers", [0, 2])
    def test_of_some_patches_is_that_of_all_with_the_others_masked(self, backend, variant, registers):
        rows = torch.cat([torch.arange(registers), PLACES + registers])

        def masked(query, key, value, gate, alpha):
            logits = query @ key.mT / 8**0.5
            if variant != "none":
                logits[..., registers:, registers:] += spatial_decay(gate[..., registers:], alpha, GRID, variant)
            hidden = torch.full((logits.shape[-1],), -torch.inf).index_fill(0, rows, 0.0)
            return ((logits + hidden).softmax(-1) @ value)[:, :, rows]

        def some(*tensors):
            tensors = [*(x.index_select(2, rows) for x in tensors[:4]), tensors[4]]
            options = {"variant": variant, "backend": backend, "num_registers": registers, "places": PLACES}
            return spatial_decay_attention(*tensors, GRID, **options)

        results = []
        for function in (masked, some):
            tensors = inputs(12 + registers)
            output = function(*tensors)
            weights = torch.sin(torch.arange(output.numel())).view_as(output)
            gradients = torch.autograd.grad(
                (output * weights).sum(), tensors, allow_unused=True, materialize_grads=True
            )
            results.append([output, *gradients])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_what_needs_the_whole_grid_is_refused_or_not_chosen(self):
        tensors = [*(x[:, :, PLACES] for x in inputs(12)[:4]), inputs(12)[4]]
        for options in ({"variant": "raster"}, {"decomposed": True}, {"prune_eps": 0.1}):
            with pytest.raises(ValueError, match="places leave out tokens"):
                spatial_decay_attention(*tensors, GRID, places=PLACES, **options)
        with pytest.raises(ValueError, match="places name 4 tokens, but query and key have 5"):
            spatial_decay_attention(*tensors, GRID, places=PLACES[1:])
        for name in WITHOUT_PLACES:
            with pytest.raises(ValueError, match=f"'{name}' takes no places, only all of the grid: use 'dense'"):
                spatial_decay_attention(*tensors, GRID, places=PLACES, backend=name)
        query = torch.empty(1, 2, 5, 16, device="meta")
        for device in ("cpu", "cuda"):
            assert choose_backend(query, query, device, whole_grid=False) == "dense"
        with pytest.raises(ValueError, match="'raster' sums the gates of all tokens"):
            spatial_decay(tensors[3], tensors[4], GRID, "raster", PLACES)


each_model = pytest.mark.parametrize(
    "options",
    [
        *({"spatial_decay": variant} for variant in VARIANTS),
        {"num_registers": 2, "rotary": True, "position_embedding": "none"},
        {"norm_type": "rms", "qk_norm": "rms_norm", "activation_fn": "swiglu", "adaln": "single", "rotary": True},
        {"adaln": "low_rank", "num_registers": 1, "spatial_decay": "content"},
    ],
    ids=str,
)


class TestModel:
    @each_model
    def test_a_route_of_all_patches_changes_nothing(self, make_model, options):
        model = make_model(num_layers=4, **options)
        model.set_attention_backend("dense")
        expected = model(*batch()).sample
        for start, end in ((0, 4), (1, 3), (2, 3)):
            found = model(*batch(), route=TokenRoute(torch.arange(16), start, end)).sample
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    @each_model
    def test_blocks_inside_see_its_patches_and_the_others_stay_as_they_were(self, make_model, options):
        model, rows = make_model(num_layers=4, **options), ROUTE.rows(options.get("num_registers", 0))
        seen = {}
        for i, block in enumerate(model.transformer_blocks):
            block.register_forward_hook(lambda _, args, output, i=i: seen.update({i: (args[0], output)}))
        model(*batch(), route=ROUTE)
        tokens = seen[0][0].shape[1]
        assert [seen[i][0].shape[1] for i in range(4)] == [tokens, len(rows), len(rows), tokens]
        torch.testing.assert_close(seen[1][0], seen[0][1][:, rows])
        torch.testing.assert_close(seen[3][0][:, rows], seen[2][1])
        others = [i for i in range(tokens) if i not in rows]
        torch.testing.assert_close(seen[3][0][:, others], seen[0][1][:, others])

    def test_compiles_to_one_graph_and_checkpointing_changes_no_gradient(self, make_model):
        torch.compiler.reset()
        model = make_model(num_layers=2, num_registers=2, rotary=True)
        compiled, results = torch.compile(model, fullgraph=True, backend="eager"), []
        for forward, checkpointing in ((model, False), (model, True), (compiled, False)):
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
            model.zero_grad()
            image, *rest = batch()
            image.requires_grad_()
            output = forward(image, *rest, route=ROUTE._replace(end=2)).sample
            output.square().sum().backward()
            assert (image.grad.abs() > 0).all()  # those of the others too
            results.append([output.detach(), image.grad, *(p.grad.clone() for p in model.parameters())])
        for others in results[1:]:
            for expected, found in zip(results[0], others, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    def test_under_autocast_it_is_close_to_fp32(self, make_model):
        model = make_model(num_layers=4)
        expected = model(*batch(), route=ROUTE).sample
        with torch.autocast("cpu", torch.bfloat16):
            found = model(*batch(), route=ROUTE).sample
        assert 0 < (found.float() - expected).norm() < 0.05 * expected.norm()
        found = make_model(num_layers=4).bfloat16()(batch()[0].bfloat16(), *batch()[1:], route=ROUTE).sample
        assert (found.float() - expected).norm() < 0.1 * expected.norm()

    @pytest.mark.parametrize(
        "options",
        [{"spatial_decay": "raster"}, {"decomposed": True}, {"local_position_kernel_size": 3}, {"long_skips": True}],
        ids=str,
    )
    def test_options_that_need_all_patches_are_refused_by_name(self, make_model, options):
        model = make_model(num_layers=4, **options)
        with pytest.raises(ValueError, match=f"leaves out some, and {next(iter(options))}.* needs all of them"):
            model(*batch(), route=ROUTE)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"start": 3}, "begin before it ends, within the 4 blocks, not be 3 to 3"),
            ({"end": 5}, "within the 4 blocks, not be 1 to 5"),
            ({"start": -1}, "not be -1 to 3"),
            ({"places": torch.tensor([0, 16])}, r"sorted, without repetition, and of 0\.\.15"),
            ({"places": torch.tensor([-1, 3])}, r"of 0\.\.15"),
            ({"places": torch.tensor([3, 3])}, "without repetition"),
            ({"places": torch.tensor([4, 3])}, "sorted"),
            ({"places": torch.tensor([0.0, 3.0])}, "whole numbers, not a tensor of shape .* and torch.float32"),
            ({"places": torch.ones(16, dtype=torch.bool)}, "torch.bool"),
            ({"places": torch.arange(0)}, "1 to 16 whole numbers"),
            ({"places": torch.arange(4)[None]}, "shape"),
        ],
    )
    def test_a_route_that_does_not_fit_is_refused(self, make_model, change, message):
        with pytest.raises(ValueError, match=message):
            make_model(num_layers=4)(*batch(), route=ROUTE._replace(**change))

    def test_the_output_of_a_block_inside_is_refused(self, make_model):
        model = make_model(num_layers=4)
        tokens = model(*batch(), route=ROUTE, block_outputs=(0, 3)).block_outputs
        assert [x.shape[1] for x in tokens] == [16, 16]
        for block in (1, 2):
            with pytest.raises(ValueError, match=f"leaves out tokens of block {block}"):
                model(*batch(), route=ROUTE, block_outputs=(block,))
