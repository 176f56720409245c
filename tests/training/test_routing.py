"""Routes of training: how they are drawn, where they are used, and what is refused."""

import pytest
import torch

from sdt_diffusion.attention_processor import set_decay_backend
from sdt_diffusion.training.objectives import (
    DiffusionLoss,
    DispersiveLoss,
    ObjectiveArguments,
    TokenRouting,
    build_objective,
    build_routing,
)
from sdt_diffusion.training.train_dit import flops_of, main
from sdt_diffusion.utils.seeding import Draws
from tests.training.helpers import build_run, trained, weights_of


def draws_for(rows, step=0, seed=0):
    return Draws(seed, step, rows, images_per_step=8)


def args(**options):
    return ObjectiveArguments(**{"routing_ratio": 0.5, **options})


class Recorder(torch.nn.Module):
    """Predicts zeros and keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, sample, timestep, class_labels, route=None, **options):
        self.calls.append((sample, timestep, route, options["force_drop_ids"]))
        return (torch.zeros_like(sample),)


class TestRoutes:
    def test_are_sorted_and_of_one_size_and_follow_from_seed_and_step(self):
        routing = TokenRouting(16, 0.3, 1, 2)
        routes = [routing(draws_for(slice(0, 8), step)).places for step in range(50)]
        for places in routes:
            assert len(places) == 16 - 5
            assert torch.equal(places, places.unique())
        assert torch.equal(routes[3], routing(draws_for(slice(0, 8), 3)).places)
        assert len({tuple(places.tolist()) for places in routes}) > 45
        assert not torch.equal(routes[0], routing(draws_for(slice(0, 8), seed=1)).places)
        share = torch.cat(routes).bincount(minlength=16) / 50
        assert share.min() > 0.4  # no patch is left out for good

    def test_are_the_same_for_all_batches_and_processes_of_a_step_and_leave_the_noise_as_it_was(self):
        clean, labels, calls = torch.randn(8, 1, 4, 4), torch.zeros(8, dtype=torch.long), []
        for routing in (TokenRouting(16, 0.5, 1, 2), None):
            model, loss = Recorder(), DiffusionLoss(build_objective(args()), 0.5, routing=routing)
            for rows in (slice(0, 8), slice(0, 3), slice(3, 8)):
                loss(model, clean[rows], labels[rows], draws_for(rows))
            calls.append(model.calls)
        (whole, *parts), plain = calls
        for part in parts:
            assert torch.equal(part[2].places, whole[2].places)
        for i in (0, 1, 3):
            assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
            assert torch.equal(plain[0][i], whole[i])
        assert [call[2] for call in plain] == [None] * 3

    def test_are_for_training_alone(self):
        model, loss = Recorder(), DiffusionLoss(build_objective(args()), routing=TokenRouting(16, 0.5, 1, 2))
        loss.errors(model, torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.long), draws_for(slice(0, 8)))
        assert model.calls[0][2] is None

    def test_begin_and_end_where_the_authors_do(self, make_model):
        for depth, blocks in ((28, (2, 24)), (12, (1, 10)), (2, (1, 2))):
            routing = build_routing(args(), make_model(num_layers=depth, attention_head_dim=4))
            assert (routing.start, routing.end) == blocks
        assert build_routing(ObjectiveArguments(), make_model()) is None

    def test_save_operations(self, make_model):
        model = make_model(num_layers=4)
        routing = build_routing(args(routing_blocks=[0, 4]), model)
        assert flops_of(model, routing) < 0.65 * flops_of(model)
        assert flops_of(model) == flops_of(model, None)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("options", "model", "message"),
        [
            ({}, {"spatial_decay": "raster"}, "spatial_decay raster"),
            ({}, {"decomposed": True}, "decomposed"),
            ({}, {"local_position_kernel_size": 3}, "local_position_kernel_size"),
            ({}, {"long_skips": True}, "long_skips"),
            ({"routing_blocks": [2, 5]}, {}, r"routing_blocks \[2, 5\]: .* within the 4 blocks"),
            ({"routing_blocks": [2, 2]}, {}, "begin before it ends"),
            ({}, {"num_layers": 1}, "begin before it ends"),
            ({"routing_ratio": 0.01}, {}, "01 of 16 patches is 0: at least one must skip"),
            ({"routing_ratio": 0.99}, {}, "is 16"),
        ],
    )
    def test_what_does_not_go_together(self, make_model, options, model, message):
        model = make_model(**{"num_layers": 4, **model})
        with pytest.raises(
            ValueError, match=rf"routing_ratio 0.*{message}" if "routing_ratio" not in message else message
        ):
            build_routing(args(**options), model)

    def test_terms_that_need_blocks_inside(self, make_model):
        model = make_model(num_layers=4)
        build_routing(args(routing_blocks=[1, 3]), model, [DispersiveLoss(0.5, block=0), DispersiveLoss(0.5, block=3)])
        with pytest.raises(ValueError, match=r"routing_ratio 0\.5, .* leaves out tokens of block 1"):
            build_routing(args(routing_blocks=[1, 3]), model, [DispersiveLoss(0.5, block=1)])

    def test_attention_that_needs_the_whole_grid(self, make_model, monkeypatch):
        model = make_model()
        for name in ("dense", "reference", "factored", "native"):
            model.set_attention_backend(name)
            build_routing(args(), model)
        for name in ("blockwise", "flex"):
            model.set_attention_backend(name)
            with pytest.raises(ValueError, match=f"the attention_backend {name} needs all of the grid: name dense"):
                build_routing(args(), model)
        set_decay_backend(model, None, prune_eps=0.1)
        with pytest.raises(ValueError, match="set attention_prune_eps to 0"):
            build_routing(args(), model)
        model.reset_attention_backend()
        monkeypatch.setenv("SDT_ATTENTION_BACKEND", "blockwise")
        with pytest.raises(ValueError, match="attention_backend blockwise"):
            build_routing(args(), model)

    def test_values(self):
        for options, message in (
            ({"routing_blocks": [1, 3], "routing_ratio": 0.0}, "routing_blocks needs routing_ratio"),
            ({"routing_blocks": [1]}, "two numbers"),
            ({"routing_blocks": 3}, "two numbers"),
            ({"routing_blocks": [1, 2.5]}, "whole number"),
            ({"routing_blocks": [-1, 2]}, "at least 0"),
            ({"routing_ratio": 1.0}, "less than 1"),
            ({"routing_ratio": float("nan")}, "routing_ratio"),
            ({"objective": "meanflow"}, "routing_ratio does not apply to objective meanflow"),
        ):
            with pytest.raises(ValueError, match=message):
                args(**options)

    def test_flags_before_anything_is_written(self, tmp_path):
        flags = ["--report_to", "none", "--output_dir", str(tmp_path / "out"), "--routing_ratio", "0.5"]
        with pytest.raises(SystemExit, match=r"routing_blocks \[1, 99\]: .* within the 4 blocks"):
            main([*flags, "--routing_blocks", "1", "99"])
        assert not (tmp_path / "out").exists()


def test_a_run_resumes_exactly_and_routes_matter(tmp_path):
    def run(name, steps, ratio=0.5, **options):
        run = build_run(tmp_path / name, {"rotary": True}, max_train_steps=steps, **options)
        arguments = ObjectiveArguments(routing_ratio=ratio)
        routing = build_routing(arguments, run.unwrapped_model)
        loss = DiffusionLoss(build_objective(arguments), class_dropout_prob=0.5, routing=routing)
        return weights_of(trained(run, loss))

    whole = run("whole", 4)
    run("resumed", 2)
    resumed = run("resumed", 4, resume_from_checkpoint="latest")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole, resumed, strict=True))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(whole, run("plain", 4, 0.0), strict=True))
