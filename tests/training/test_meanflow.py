"""The averaged flow: its loss, its derivatives, and what it refuses."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sdt_diffusion import SDTPipeline
from sdt_diffusion.attention import SPATIAL_DECAY_VARIANTS
from sdt_diffusion.attention_processor import set_decay_backend
from sdt_diffusion.sampling.settings import SamplerArguments
from sdt_diffusion.training.objectives import OBJECTIVES, DiffusionLoss, Noised, ObjectiveArguments, build_objective
from sdt_diffusion.training.train_dit import main
from sdt_diffusion.utils.seeding import Draws
from tests.sdt.gaussian import MEAN, STD, GaussianMeanFlow
from tests.training.helpers import build_run, trained, weights_of


def draws_for(n, rows=None, seed=0):
    return Draws(seed=seed, step=0, rows=rows or slice(0, n), images_per_step=n)


def build(**options):
    return build_objective(ObjectiveArguments(objective="meanflow", **options))


def intervals(n=4096, **options):
    """Return noised images of a constant, before and after their intervals are drawn."""
    objective, draws = build(**options), draws_for(n)
    flow = objective.noised(torch.full((n, 1, 2, 2), 0.7), draws)
    return flow, objective.with_intervals(flow, draws)


def gaussian(n=4096, dtype=torch.float64, **options):
    """Return noised Gaussian data, with its intervals, and the labels that go with it."""
    objective, draws = build(**options), draws_for(n)
    generator = torch.Generator().manual_seed(1)
    clean = (MEAN + STD * torch.randn(n, 1, 2, 2, generator=generator)).to(dtype)
    noised = objective.with_intervals(objective.noised(clean, draws), draws)
    noised = Noised(*(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in noised))
    return objective, noised, torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool)


class TestIntervals:
    def test_the_later_time_is_that_of_the_image_which_stays_on_its_line(self):
        flow, noised = intervals()
        assert (noised.end_timestep <= noised.timestep).all()
        assert (noised.timestep >= flow.timestep).all()
        sigma = noised.timestep.reshape(-1, 1, 1, 1) / 1000
        torch.testing.assert_close(noised.sample - sigma * noised.target, torch.full_like(noised.sample, 0.7))
        assert torch.equal(noised.target, flow.target)

    @pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
    def test_a_share_has_no_length(self, ratio):
        _, noised = intervals(64, meanflow_ratio=ratio)
        assert (noised.end_timestep == noised.timestep).sum() == 64 * ratio
        assert torch.equal(noised.averaged, (noised.end_timestep < noised.timestep).nonzero().flatten())

    def test_both_times_have_the_distribution_and_the_shift_of_a_flow(self):
        for options in ({"logit_mean": -0.4}, {"weighting_scheme": "none", "time_shift": 3.0}):
            flow, noised = intervals(meanflow_ratio=0.0, **options)
            first, second = noised.timestep, noised.end_timestep
            other = torch.where(first == flow.timestep, second, first)
            assert other.mean().item() == pytest.approx(flow.timestep.mean().item(), abs=15)
            assert other.std().item() == pytest.approx(flow.timestep.std().item(), abs=15)

    def test_they_do_not_depend_on_the_number_of_processes(self):
        objective, clean = build(meanflow_ratio=0.3), torch.randn(12, 1, 2, 2)
        parts = []
        for rows in (slice(0, 12), slice(0, 5), slice(5, 12)):
            draws = draws_for(12, rows)
            parts.append(objective.with_intervals(objective.noised(clean[rows], draws), draws))
        whole, *halves = parts
        assert torch.equal(whole.end_timestep, torch.cat([half.end_timestep for half in halves]))
        assert torch.equal(whole.averaged, torch.cat([halves[0].averaged, halves[1].averaged + 5]))


class TestTheExactAverage:
    """Of Gaussian data, where it is known."""

    def test_turns_into_the_flow(self):
        objective, noised, labels, dropped = gaussian()
        model = GaussianMeanFlow()
        u = model(noised.sample, noised.timestep, labels, end_timestep=noised.end_timestep)[0]
        flow = model(noised.sample, noised.timestep, labels)[0]
        correction = objective.correction(model, noised, labels, dropped)
        assert correction.abs().max() > 0.1
        torch.testing.assert_close(u + correction, flow, rtol=1e-9, atol=1e-9)

    def test_has_the_least_loss(self):
        """V is a regression on noise - x, whose mean given z is the flow."""

        class Near(GaussianMeanFlow):
            factor, offset, tilt = 1.0, 0.0, 0.0

            def forward(self, hidden_states, timestep, *args, **kwargs):
                average = super().forward(hidden_states, timestep, *args, **kwargs)[0]
                return (self.factor * average + self.offset + self.tilt * hidden_states,)

        def loss(**change):
            model, objective = Near(), build(meanflow_ratio=0.2)
            for name, value in change.items():
                setattr(model, name, value)
            clean = MEAN + STD * torch.randn(4096, 1, 2, 2, generator=torch.Generator().manual_seed(1))
            return DiffusionLoss(objective)(model, clean, torch.zeros(4096, dtype=torch.long), draws_for(4096))

        least = loss()
        for change in ({"factor": 1.1}, {"factor": 0.9}, {"offset": 0.1}, {"offset": -0.1}, {"tilt": 0.1}):
            assert loss(**change) > least + 1e-3, change

    def test_its_held_out_error_is_that_of_the_flow(self):
        clean = MEAN + STD * torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(1))
        labels, found = torch.zeros(64, dtype=torch.long), []
        for objective in ("meanflow", "flow"):
            loss = DiffusionLoss(build_objective(ObjectiveArguments(objective=objective)))
            found.append(loss.errors(GaussianMeanFlow(), clean, labels, draws_for(64)))
        (noised, error), (expected, expected_error) = found
        assert torch.equal(noised.sample, expected.sample)
        assert torch.equal(error, expected_error)


class ExactTimesteps(nn.Module):
    """The features of timesteps in fp64; diffusers' are in fp32, which differences would show."""

    def forward(self, timestep):
        frequencies = torch.exp(-math.log(1e4) * torch.arange(128, dtype=torch.float64) / 128)
        phases = timestep[:, None] / 1000 * frequencies
        return torch.cat([phases.cos(), phases.sin()], dim=-1)


class TestDerivatives:
    @pytest.fixture
    def build_model(self, make_model):
        def build_model(**options):
            model = make_model(interval_conditioning=True, timestep_scale=0.001, patch_size=1, **options).double()
            model.time_class_embed.time_proj = ExactTimesteps()
            return model

        return build_model

    def check(self, model, grid):
        objective, generator = build(), torch.Generator().manual_seed(0)
        sample, target = torch.randn(2, 2, 3, *grid, generator=generator, dtype=torch.float64)
        timestep, end = torch.tensor([[900.0, 300.0], [100.0, 250.0]], dtype=torch.float64)
        labels, dropped = torch.tensor([1, 4]), torch.tensor([False, True])
        noised = Noised(sample, timestep, target, torch.ones(2), None, end, torch.arange(2))
        found = objective.correction(model, noised, labels, dropped)

        def u(shift):
            t = timestep + 1000 * shift
            with torch.no_grad():
                return model(sample + shift * flow, t, labels, False, dropped, end_timestep=end)[0]

        with torch.no_grad():
            flow = model(sample, timestep, labels, False, dropped)[0]
        difference = (u(1e-5) - u(-1e-5)) / 2e-5
        expected = difference * ((timestep - end) / 1000).reshape(-1, 1, 1, 1)
        assert expected.norm() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (3, 5)])
    @pytest.mark.parametrize("variant", SPATIAL_DECAY_VARIANTS)
    def test_through_the_decay_at_every_grid(self, build_model, variant, grid):
        self.check(build_model(spatial_decay=variant, sample_size=grid), grid)

    @pytest.mark.parametrize(
        "options",
        [
            {"norm_type": "rms", "qk_norm": "rms_norm", "activation_fn": "swiglu", "adaln": "single"},
            {"decomposed": True, "long_skips": True},
            {"num_registers": 2, "network_output": "clean"},
        ],
        ids=str,
    )
    def test_through_the_options_of_the_model(self, build_model, options):
        self.check(build_model(**options), (3, 5))

    def test_under_autocast_they_are_close_to_those_in_fp32(self, make_model):
        model = make_model(interval_conditioning=True, timestep_scale=0.001)
        objective, noised, labels, dropped = gaussian(16, torch.float32)
        noised = noised._replace(sample=noised.sample.repeat(1, 3, 4, 4), target=noised.target.repeat(1, 3, 4, 4))
        expected = objective.correction(model, noised, labels, dropped)
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as accelerate wraps it
        found = objective.correction(model, noised, labels, dropped)
        assert found.dtype == torch.float32
        assert 0 < (found - expected).norm() < 0.03 * expected.norm()

    def test_run_no_compiled_code_keep_no_graph_and_leave_the_model_as_it_was(self, make_model):
        def refuse(graph, inputs):
            raise AssertionError("compiled")

        model = make_model(interval_conditioning=True).train()
        model.gradient_checkpointing = True
        model.compile(backend=refuse)
        objective, noised, labels, dropped = gaussian(4, torch.float32)
        noised = noised._replace(sample=noised.sample.repeat(1, 3, 4, 4), target=noised.target.repeat(1, 3, 4, 4))
        assert not objective.correction(model, noised, labels, dropped).requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())


class TestGuidance:
    class Labels(nn.Module):
        """Predicts the label's number, 5 for the null class."""

        def forward(self, sample, timestep, class_labels, force_drop_ids, return_dict, end_timestep=None):
            label = torch.where(force_drop_ids, 5, class_labels).to(sample.dtype)
            return (label.reshape(-1, 1, 1, 1).expand_as(sample),)

    def test_is_in_the_target_of_labels_that_are_not_dropped(self):
        _, noised = intervals(2)
        labels, dropped = torch.tensor([1, 2]), torch.tensor([False, True])
        found = build(meanflow_guidance_scale=3.0).guided(self.Labels(), noised, labels, dropped).target
        torch.testing.assert_close(found[0], 3 * noised.target[0] - 2 * 5)
        assert torch.equal(found[1], noised.target[1])
        assert build().guided(self.Labels(), noised, labels, dropped) is noised

    def test_needs_the_null_class(self, make_model):
        model = make_model(interval_conditioning=True, class_dropout_prob=0.0)
        build().check_model(model)
        with pytest.raises(ValueError, match="meanflow_guidance_scale needs the null class"):
            build(meanflow_guidance_scale=2.0).check_model(model)


def test_the_adaptive_weight_divides_an_error_by_itself():
    error = torch.tensor([0.0, 1.0, 100.0])
    torch.testing.assert_close(build(meanflow_adaptive_power=1.0).adaptive_weight(error), 1 / (error + 1e-3))
    assert torch.equal(build().adaptive_weight(error), torch.ones(3))
    clean, labels = torch.zeros(64, 1, 2, 2), torch.zeros(64, dtype=torch.long)
    loss = DiffusionLoss(build(meanflow_adaptive_power=1.0))(GaussianMeanFlow(), clean, labels, draws_for(64))
    assert loss.item() == pytest.approx(1, abs=0.02)


class TestWhatIsRefused:
    def test_backends_without_forward_mode_by_name(self, make_model, monkeypatch):
        model, objective = make_model(interval_conditioning=True), build()
        for name in ("blockwise", "dense", "native"):
            model.set_attention_backend(name)
            with pytest.raises(ValueError, match=f"forward mode, which the attention_backend {name} does not have"):
                objective.check_model(model)
            model.set_attention_backend("reference")
            objective.check_model(model)
        model.reset_attention_backend()
        objective.check_model(model)
        monkeypatch.setenv("SDT_ATTENTION_BACKEND", "dense")
        with pytest.raises(ValueError, match="attention_backend dense"):
            objective.check_model(model)
        monkeypatch.delenv("SDT_ATTENTION_BACKEND")
        set_decay_backend(model, None, prune_eps=0.1)
        with pytest.raises(ValueError, match="set attention_prune_eps to 0"):
            objective.check_model(model)

    def test_options_of_other_objectives(self):
        for name in ("direction_loss_weight", "contrastive_weight", "self_alignment_weight"):
            with pytest.raises(ValueError, match=f"{name} does not apply to objective meanflow"):
                build(**{name: 0.5})
        with pytest.raises(ValueError, match="meanflow_ratio does not apply to objective flow"):
            ObjectiveArguments(meanflow_ratio=0.1)

    def test_sharded_parameters(self, make_model):
        model, (objective, noised, labels, dropped) = make_model(interval_conditioning=True), gaussian(4)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(ValueError, match=r"objective meanflow takes .* FSDP2 shards: use DDP"):
                objective.correction(model, noised, labels, dropped)
        finally:
            dist.destroy_process_group()

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--attention_backend", "dense"], "meanflow needs derivatives in forward mode"),
            (["--scheduler", "FlowMatchHeunDiscreteScheduler"], "predicts the average of the flow over a step"),
            (["--model_overrides", '{"timestep_scale": 1}'], "timestep_scale follow from .* the objective"),
            (
                ["--objective", "flow", "--model_overrides", '{"interval_conditioning": true}'],
                "interval_conditioning follow from .* the objective",
            ),
        ],
    )
    def test_flags_before_anything_is_written(self, tmp_path, flags, message):
        flags = ["--objective", "meanflow", "--report_to", "none", "--output_dir", str(tmp_path / "out"), *flags]
        with pytest.raises(SystemExit, match=message):
            main(flags)
        assert not (tmp_path / "out").exists()


def test_a_run_resumes_exactly(tmp_path):
    def run(name, steps, **options):
        model = {"interval_conditioning": True, "timestep_scale": 0.001}
        run = build_run(tmp_path / name, model, max_train_steps=steps, **options)
        return weights_of(trained(run, DiffusionLoss(build(), class_dropout_prob=0.5)))

    whole = run("whole", 2)
    run("resumed", 1)
    resumed = run("resumed", 2, resume_from_checkpoint="latest")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole, resumed, strict=True))


def test_the_script_saves_a_pipeline_of_one_step(tmp_path):
    flags = ("--objective", "meanflow", "--meanflow_guidance_scale", "1.5", "--model_overrides", '{"num_layers": 1}')
    flags += ("--train_batch_size", "8", "--mixed_precision", "no", "--cpu_threads", "1", "--report_to", "none")
    flags += ("--num_validation_images", "1", "--label_accuracy_samples", "0", "--max_train_steps", "1")
    main([*flags, "--guidance_scale", "1", "--num_inference_steps", "1", "--output_dir", str(tmp_path)])
    pipe = SDTPipeline.from_pretrained(tmp_path)
    config = pipe.transformer.config
    assert (config.interval_conditioning, config.timestep_scale) == (True, 0.001)
    assert len(pipe([3]).images) == 1
    assert pipe.num_timesteps == 1


def test_without_guidance_and_in_one_step_by_default():
    saved = SamplerArguments().with_defaults(**OBJECTIVES["meanflow"].sampling)
    assert (saved.guidance_scale, saved.num_inference_steps) == (1.0, 1)
    given = SamplerArguments(guidance_scale=2.0).with_defaults(**OBJECTIVES["meanflow"].sampling)
    assert (given.guidance_scale, given.num_inference_steps) == (2.0, 1)
