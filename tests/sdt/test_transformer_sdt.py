import accelerate
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch._dynamo.testing import CompileCounterWithBackend

from sdt_diffusion import SDTTransformer2DModel
from sdt_diffusion.attention import SPATIAL_DECAY_VARIANTS
from sdt_diffusion.sdt import PRESETS
from sdt_diffusion.sdt.embeddings import position_embedding
from tests.conftest import TINY, randomize

OPTIONS = [
    *({"spatial_decay": variant} for variant in SPATIAL_DECAY_VARIANTS),
    {"decomposed": True},
    {"qk_norm": "rms_norm", "rotary": True, "local_position_kernel_size": 3},
    {"norm_type": "rms", "activation_fn": "swiglu", "rotary": True, "decay_start": "none", "timestep_scale": 1e-3},
    {"gate_conditioning": False},
    {"sample_size": (8, 4)},
    {"out_channels": 6},
]


def batch(channels=3, size=(8, 8), n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, channels, *size, generator=generator)
    return images, torch.tensor([10.0, 900.0])[:n], torch.tensor([1, 4])[:n]


class TestAgainstDiT:
    """`none` is DiT, in facebookresearch's numerics: diffusers' differ by a frequency shift and an epsilon."""

    @staticmethod
    def pair():
        torch.manual_seed(0)
        config = {k: TINY[k] for k in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")}
        config.update(sample_size=8, patch_size=2)
        dit = randomize(DiTTransformer2DModel(**config, norm_eps=1e-6)).eval()
        sdt = SDTTransformer2DModel(**config, num_classes=1000, spatial_decay="none").eval()
        weights = {}
        for name, value in dit.state_dict().items():
            if ".norm1.emb." in name:  # a copy in every block; they must agree for one shared embedder to be the same
                name = name[name.index(".norm1.emb.") :].replace(".norm1.emb.", "time_class_embed.")
                name = name.replace(".embedding_table", "")
                weights.setdefault(name, value)
            else:
                weights[name.replace(".attn1.", ".attn.")] = value
        sdt.load_state_dict(weights)
        shared = dit.transformer_blocks[0].norm1.emb
        for block in dit.transformer_blocks:
            block.norm1.emb.load_state_dict(shared.state_dict())
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        return dit, sdt

    @pytest.mark.parametrize("size", [(8, 8), (16, 16)])
    def test_mapped_weights_give_the_same_output(self, size):
        dit, sdt = self.pair()
        images, timestep, labels = batch(size=size)
        expected = dit(images, timestep, labels).sample
        torch.testing.assert_close(sdt(images, timestep, labels).sample, expected, rtol=1e-5, atol=1e-5)

    def test_the_comparison_notices_the_frequency_shift(self):
        dit, sdt = self.pair()
        for block in dit.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 1
        images, timestep, labels = batch()
        difference = sdt(images, timestep, labels).sample - dit(images, timestep, labels).sample
        assert difference.norm() > 1e-3 * dit(images, timestep, labels).sample.norm()


@pytest.mark.parametrize(
    ("name", "dit", "sdt"),
    [
        ("SDT-S/2", 32.9, 32.9),
        ("SDT-B/2", 130.3, 130.5),
        ("SDT-L/2", 457.8, 458.6),
        ("SDT-XL/2", 674.8, 675.8),
    ],
)
def test_presets_have_dits_parameters_and_gates_add_little(name, dit, sdt):
    with torch.device("meta"):
        plain = SDTTransformer2DModel.from_preset(name, spatial_decay="none").num_parameters()
        gated = SDTTransformer2DModel.from_preset(name).num_parameters()
    assert plain / 1e6 == pytest.approx(dit, abs=0.05)
    assert gated / 1e6 == pytest.approx(sdt, abs=0.05)
    assert 0 < gated - plain < 0.002 * plain


def test_every_preset_builds():
    for name in PRESETS:
        with torch.device("meta"):
            model = SDTTransformer2DModel.from_preset(name)
        assert model.config.spatial_decay == "context"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_saved_models_load_to_the_same_output(make_model, options, tmp_path):
    model = make_model(**options)
    model.save_pretrained(tmp_path)
    loaded = SDTTransformer2DModel.from_pretrained(tmp_path)
    images, timestep, labels = batch()
    if isinstance(model.config.sample_size, (tuple, list)):
        images = images[..., :4]
    output = model(images, timestep, labels).sample
    assert output.shape == (2, model.out_channels, *images.shape[-2:])
    assert torch.equal(loaded(images, timestep, labels).sample, output)
    assert [p.suffix for p in tmp_path.iterdir() if "model" in p.name] == [".safetensors"]


@pytest.mark.parametrize("options", OPTIONS[:8], ids=str)
def test_other_grids_than_the_trained_one_work(make_model, options):
    model = make_model(**options)
    images, timestep, labels = batch(size=(4, 12))
    assert model(images, timestep, labels).sample.shape == (2, 3, 4, 12)


def test_position_embedding_is_rescaled_to_the_trained_extent(make_model):
    embed = make_model().pos_embed
    trained = embed.pos_embed[0].view(4, 4, -1)
    finer = position_embedding(32, (8, 8), embed.grid_size)[0].view(8, 8, -1)
    torch.testing.assert_close(finer[::2, ::2], trained)


def test_each_model_owns_its_position_embedding(make_model):
    models = [make_model(), make_model()]
    grids = [(8, 8), (4, 12)]
    expected = [models[1](*batch(size=size)).sample for size in grids]
    with torch.no_grad():
        models[0](*batch(size=(4, 12)))
        models[0].pos_embed.pos_embed.fill_(torch.nan)
    for model in (models[1], make_model()):
        for size, output in zip(grids, expected, strict=True):
            torch.testing.assert_close(model(*batch(size=size)).sample, output)
    assert position_embedding(32, (4, 4), (4, 4)).data_ptr() != position_embedding(32, (4, 4), (4, 4)).data_ptr()


def test_position_embedding_encodes_x_then_y_as_sine_then_cosine(make_model):
    embedding = make_model(sample_size=(8, 16)).pos_embed.pos_embed[0].view(4, 8, 32).double()
    omega = 1 / 10000 ** (torch.arange(8, dtype=torch.float64) / 8)
    for y, x in ((0, 0), (3, 1), (1, 7)):
        expected = torch.cat([(x * omega).sin(), (x * omega).cos(), (y * omega).sin(), (y * omega).cos()])
        torch.testing.assert_close(embedding[y, x], expected, rtol=0, atol=1e-5)


def test_untrained_model_predicts_zero_and_decays_like_rmt(make_model):
    torch.manual_seed(0)
    images, timestep, labels = batch()
    models = [SDTTransformer2DModel(**TINY, spatial_decay=variant).eval() for variant in ("context", "fixed")]
    assert torch.equal(models[0](images, timestep, labels).sample, torch.zeros_like(images))
    # With the gates at their start, and all else moved alike, SDT is RMT's fixed decay.
    randomize(models[1])
    missing = models[0].load_state_dict(models[1].state_dict(), strict=False)
    assert all(".gate." in name for name in missing.missing_keys)
    outputs = [model(images, timestep, labels).sample for model in models]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_queries_keys_and_values_start_as_parts_of_dits_one_matrix():
    torch.manual_seed(0)
    dim = 384
    model = SDTTransformer2DModel.from_preset("SDT-S/2", num_layers=1)
    fused = torch.empty(3 * dim, dim)
    torch.nn.init.xavier_uniform_(fused)
    attention = model.transformer_blocks[0].attn
    for linear in (attention.to_q, attention.to_k, attention.to_v):
        assert linear.weight.std().item() == pytest.approx(fused.std().item(), rel=0.01)
        assert linear.weight.abs().max().item() == pytest.approx(fused.abs().max().item(), rel=0.01)
        assert torch.equal(linear.bias, torch.zeros(dim))
    assert attention.to_out[0].weight.std().item() == pytest.approx((1 / dim) ** 0.5, rel=0.01)


class TestOtherClasses:
    """`num_classes` with `ignore_mismatched_sizes`, as diffusers' users fine-tune."""

    @pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}, {"dtype": torch.bfloat16}], ids=str)
    def test_the_class_table_is_initialized_and_all_else_is_loaded(self, make_model, tmp_path, options):
        stored = make_model()
        stored.save_pretrained(tmp_path)
        model = SDTTransformer2DModel.from_pretrained(
            tmp_path, num_classes=300, ignore_mismatched_sizes=True, **options
        )
        weights, name = model.state_dict(), "time_class_embed.class_embedder.weight"
        assert not any(value.is_meta for value in weights.values())
        table = weights.pop(name).float()
        assert table.shape == (301, 32)
        assert table.std().item() == pytest.approx(0.02, rel=0.05)
        assert all(torch.equal(value, stored.state_dict()[key].to(value.dtype)) for key, value in weights.items())
        images, timestep, _ = batch()
        assert torch.isfinite(model(images.to(model.dtype), timestep, torch.tensor([0, 299])).sample).all()

    def test_without_it_they_are_refused(self, make_model, tmp_path):
        make_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"class_embedder\.weight expected shape"):
            SDTTransformer2DModel.from_pretrained(tmp_path, num_classes=7)

    def test_single_files_are_refused_with_what_to_do(self):
        with pytest.raises(ValueError, match="sdt-diffusion convert FILE FOLDER"):
            SDTTransformer2DModel.from_single_file("DiT-XL-2-256x256.pt")


def test_timestep_and_class_steer_the_decay(make_model):
    model = make_model()
    gates = []
    model.transformer_blocks[0].attn.gate.register_forward_hook(lambda module, args, output: gates.append(output[0]))
    images = batch()[0][:1].expand(2, -1, -1, -1)
    model.transformer_blocks[0].norm1.linear.weight.data.zero_()  # the tokens that the gate sees are the same
    for timestep, labels in (([10.0, 900.0], [1, 1]), ([10.0, 10.0], [1, 2]), ([10.0, 10.0], [1, 1])):
        model(images, torch.tensor(timestep), torch.tensor(labels))
    differs = [not torch.allclose(first, second) for first, second in gates]
    assert differs == [True, True, False]


def test_label_dropout_happens_in_training_only_and_at_its_rate(make_model):
    embed = make_model(class_dropout_prob=0.25).time_class_embed
    labels, timestep = torch.ones(20_000, dtype=torch.long), torch.zeros(20_000)
    null, kept = (embed(torch.zeros(1), torch.tensor([label]), torch.float32) for label in (5, 1))
    output = embed.train()(timestep, labels, torch.float32)
    dropped = (output - null).abs().amax(1) < 1e-5
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(output[~dropped], kept.expand_as(output[~dropped]))
    torch.testing.assert_close(embed.eval()(timestep, labels, torch.float32), kept.expand_as(output))


@pytest.mark.parametrize("training", [False, True])
def test_labels_are_dropped_where_forced_and_nowhere_else(make_model, training):
    model = make_model(class_dropout_prob=0.5).train(training)
    images, timestep = torch.randn(4, 3, 8, 8), torch.full((4,), 500.0)
    forced = model(images, timestep, torch.arange(4), force_drop_ids=torch.tensor([1, 0, 1, 0])).sample
    expected = model.eval()(images, timestep, torch.tensor([5, 1, 5, 3])).sample
    torch.testing.assert_close(forced, expected)


def test_gradient_checkpointing_changes_no_gradient(make_model):
    gradients = []
    for checkpointing in (False, True):
        model = make_model()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*batch()).sample.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options",
    [OPTIONS[7], *({"spatial_decay": name} for name in SPATIAL_DECAY_VARIANTS if name != "context")],
    ids=str,
)
def test_compiles_without_a_graph_break_and_never_again(make_model, options):
    """The whole model is one graph, which serves every further step of sampling and of training."""
    torch.compiler.reset()
    model = make_model(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images, timestep, labels = batch()
    expected = model(images, timestep, labels).sample
    torch.testing.assert_close(compiled(images, timestep, labels).sample, expected, rtol=1e-4, atol=1e-4)
    for training in (False, True):
        model.train(training)
        compiled(images, timestep, labels).sample.sum().backward()
        with torch.compiler.set_stance("fail_on_recompile"):
            for seed in range(3):
                other, _, _ = batch(seed=seed)
                t, y = torch.tensor([1.0, 500.0]) + seed, torch.tensor([seed, 5])
                compiled(other, t, y).sample.sum().backward()


@pytest.mark.parametrize("sample_size", [(8, 8), (8, 12)])
def test_one_graph_with_dynamic_sizes_serves_the_trained_and_other_grids(make_model, sample_size):
    torch.compiler.reset()
    model = make_model(sample_size=sample_size)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    # A compiler takes sizes that are equal at first to be always equal: after square grids, test square grids.
    others = [(16, 16), (4, 4)] if sample_size == (8, 8) else [(16, 4), (4, 6), (20, 8)]
    with torch.no_grad():
        for size in (sample_size, *others):
            images, timestep, labels = batch(size=size)
            expected = model(images, timestep, labels).sample
            torch.testing.assert_close(compiled(images, timestep, labels).sample, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_gates_stay_in_fp32_when_loaded_in_bf16(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    model = SDTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {".gate." in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    images, timestep, labels = batch()
    output = model(images.bfloat16(), timestep, labels).sample
    expected = make_model()(images, timestep, labels).sample
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.05 * expected.norm()


def test_autocast_is_close_to_fp32(make_model):
    model = make_model(qk_norm="rms_norm", rotary=True)
    images, timestep, labels = batch()
    expected = model(images, timestep, labels).sample
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, timestep, labels).sample
    output.float().square().sum().backward()
    assert (output.float() - expected).norm() < 0.05 * expected.norm()


def test_the_residual_stream_stays_in_fp32_under_autocast(make_model):
    model = make_model()
    dtypes = []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch())
    assert dtypes == [torch.float32] * 2


def test_offloaded_weights_are_fetched_for_every_module(make_model):
    model = make_model()
    expected = model(*batch()).sample
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer_blocks[0].attn.gate.proj.weight.device.type == "meta"
    torch.testing.assert_close(model(*batch()).sample, expected)


def test_scalar_timesteps_are_taken_for_the_whole_batch(make_model):
    model = make_model()
    images, _, labels = batch()
    one = model(images, torch.tensor(7), labels, return_dict=False)[0]
    torch.testing.assert_close(one, model(images, torch.tensor([7, 7]), labels).sample)


class TestBadInput:
    def test_unknown_preset(self):
        with pytest.raises(ValueError, match=r"Unknown preset 'SDT-M/2'.*SDT-S/2.*SDT-digits"):
            SDTTransformer2DModel.from_preset("SDT-M/2")

    def test_unknown_config_key(self):
        with pytest.raises(ValueError, match=r"Unknown config key\(s\) depth.*known keys: .*num_layers"):
            SDTTransformer2DModel.from_preset("SDT-S/2", depth=3)

    def test_unknown_variant(self):
        with pytest.raises(ValueError, match="Unknown spatial_decay 'gaussian'"):
            SDTTransformer2DModel(**TINY, spatial_decay="gaussian")

    def test_unknown_activation_and_decays_that_are_none(self):
        with pytest.raises(ValueError, match="Unknown activation_fn 'relu6'"):
            SDTTransformer2DModel(**TINY, activation_fn="relu6")
        with pytest.raises(ValueError, match=r"Decay exponents from 0\.0 over a range of 6\.0 must be positive"):
            SDTTransformer2DModel(**TINY, decay_initial_value=0.0)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("norm_type", "batch"),
            ("norm_type", None),
            ("decay_start", "weak"),
            ("decay_start", ["none"]),
            ("timestep_scale", 0.0),
            ("timestep_scale", float("nan")),
            ("timestep_frequency_shift", 2.0),
        ],
    )
    def test_unknown_values_of_options(self, key, value):
        with pytest.raises(ValueError, match=key):
            SDTTransformer2DModel(**TINY, **{key: value})

    def test_sizes_that_do_not_divide(self):
        with pytest.raises(ValueError, match="sample_size 9x9 is not divisible by patch_size 2"):
            SDTTransformer2DModel(**{**TINY, "sample_size": 9})
        with pytest.raises(ValueError, match="width 6 must be divisible by 4"):
            SDTTransformer2DModel(**{**TINY, "num_attention_heads": 1, "attention_head_dim": 6})
        with pytest.raises(ValueError, match="attention_head_dim 6 must be divisible by 4 for rotary"):
            SDTTransformer2DModel(**{**TINY, "attention_head_dim": 6}, rotary=True)

    def test_input_that_does_not_fit(self, make_model):
        model = make_model()
        images, timestep, labels = batch()
        with pytest.raises(ValueError, match="takes 3 channels, but the input has 4"):
            model(torch.randn(2, 4, 8, 8), timestep, labels)
        with pytest.raises(ValueError, match="8x7 is not divisible by the model's patch_size 2"):
            model(images[..., :7], timestep, labels)
        with pytest.raises(ValueError, match=r"2 inputs need as many class labels, not a tensor of shape \(1,\)"):
            model(images, timestep, labels[:1])
        for label in (-1, 6):
            with pytest.raises(ValueError, match=r"must lie in 0\.\.5 \(5 is the null class\)"):
                model(images, timestep, torch.tensor([0, label]))
