"""One run shared by processes: the same weights, and checkpoints that any number of them can go on from."""

import os
import shutil
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import distributed, nn
from torch._dynamo.testing import CompileCounter

from sdt_diffusion.training.monitor import read_log
from tests.data.encoders import save_encoder
from tests.scripts.process import call, fork_ranks
from tests.training import small_run

#: Sums in another order: weights, averages and moments of order one, at a learning rate of 0.01.
TOLERANCE = 1e-6


def train(output_dir, strategy, *values, processes):
    """A single process is this one: starting another takes longer than the run."""
    if processes == 1:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        small_run.main(str(output_dir), strategy, *values)
        return output_dir
    fork_ranks(small_run.__file__, output_dir, strategy, *values, processes=processes)
    return output_dir


def begun(folder, run, step=3):
    """A folder that holds another's checkpoint."""
    shutil.copytree(run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(run / "training_config.yaml", folder)
    return folder


def assert_same(folder, expected_folder, files=5):
    names = sorted(path.relative_to(expected_folder) for path in expected_folder.rglob("*.safetensors"))
    assert len(names) == files
    for name in names:
        found, expected = load_file(folder / name), load_file(expected_folder / name)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("processes") / "alone", "ddp", processes=1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_with_half_the_batch_each_learn_what_one_does(alone, tmp_path, strategy):
    shared = train(tmp_path / strategy, strategy, "train_batch_size=4", processes=2)
    assert_same(shared / "checkpoint-6", alone / "checkpoint-6")
    assert_same(shared / "product", alone / "product", files=1)
    for found, expected in zip(read_log(shared), read_log(alone), strict=True):
        measured = ("images_per_second", "elapsed_seconds", "memory_gib", "seconds_left")
        found, expected = ({k: v for k, v in record.items() if k not in measured} for record in (found, expected))
        assert found == pytest.approx(expected, rel=1e-4)

    # Resume on one process what two have saved.
    resume = ("train_batch_size=4", "gradient_accumulation_steps=2", "resume_from_checkpoint=latest")
    part = train(begun(tmp_path / "part", shared), "ddp", *resume, processes=1)
    assert_same(part / "checkpoint-6", alone / "checkpoint-6")


def test_two_processes_learn_the_average_of_a_flow_as_one_does(tmp_path):
    """MeanFlow also asks the model outside of DDP, which FSDP2's sharded weights do not allow."""
    words = ("objective=meanflow", "max_train_steps=3")
    alone = train(tmp_path / "alone", "ddp", *words, processes=1)
    shared = train(tmp_path / "shared", "ddp", "train_batch_size=4", *words, processes=2)
    assert_same(shared / "checkpoint-3", alone / "checkpoint-3", files=4)
    assert_same(shared / "product", alone / "product", files=1)


def test_a_script_of_two_processes_and_then_of_one_trains_as_one_does(tmp_path):
    """Muon, an encoder's features and routes of tokens, by the command line of train_dit.py."""
    encoder = save_encoder(tmp_path / "encoder")
    model = ("--model", "SDT-digits", "--model_overrides", '{"num_layers": 2, "patch_size": 2}')
    options = ("--optimizer", "muon", "--adam_epsilon", "1e-4", "--routing_ratio", "0.5", "--routing_blocks", "1", "2")
    options += ("--alignment_model", encoder, "--alignment_width", "8", "--alignment_block", "1")
    options += ("--lr_scheduler", "constant")
    quiet = ("--report_to", "none", "--validation_steps", "0", "--label_accuracy_samples", "0", "--cpu_threads", "1")
    quiet += ("--num_validation_images", "1", "--num_inference_steps", "1", "--mixed_precision", "no")

    def run(name, steps, batch, processes=1, resume=()):
        sizes = ("--max_train_steps", steps, "--train_batch_size", batch, "--output_dir", tmp_path / name)
        words = ["train/train_dit.py", *model, *options, *quiet, *sizes, *resume]
        if processes == 1:
            assert call(*words).returncode == 0
        else:
            fork_ranks(*words, processes=processes)
        return tmp_path / name

    alone = run("alone", 4, 8)
    run("part", 2, 4, processes=2)
    part = run("part", 4, 8, resume=("--resume_from_checkpoint", "latest"))
    assert_same(part / "checkpoint-4", alone / "checkpoint-4", files=4)
    assert_same(part / "transformer", alone / "transformer", files=1)
    losses = [record["alignment_loss"] for record in read_log(alone) if "loss" in record]
    assert losses
    assert all(-1 <= loss <= 1 for loss in losses)


def test_two_processes_resume_what_one_saved(alone, tmp_path):
    resume = ("train_batch_size=4", "resume_from_checkpoint=latest")
    part = train(begun(tmp_path / "part", alone), "fsdp2", *resume, processes=2)
    assert_same(part / "checkpoint-6", alone / "checkpoint-6")


@pytest.fixture
def group():
    """A group of one process, for FSDP2 in this one."""
    with mock.patch.dict(os.environ):  # where accelerate notes that there is a group
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        yield
    if distributed.is_initialized():  # a run that comes to its end ends the group
        distributed.destroy_process_group()


def test_fsdp2_computes_in_the_precision_of_ddp(tmp_path, group):
    """bf16 for matrix products, and not for the timesteps: a step of 4 between 512 and 1000."""
    words = ("mixed_precision=bf16", "objective=plain")  # the gradients of many terms round in another order
    found = train(tmp_path / "sharded", "fsdp2", *words, processes=1)
    expected = train(tmp_path / "alone", "ddp", *words, processes=1)
    assert_same(found / "product", expected / "product", files=1)


def test_fsdp2_compiles_its_blocks_as_one(alone, tmp_path, group, monkeypatch):
    torch.compiler.reset()
    counter, compile_module = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_module(self, backend=counter, **how))
    found = train(tmp_path / "compiled", "fsdp2", "compile=regional", processes=1)
    assert counter.frame_count == 2  # with all tokens, and with those of the route
    assert_same(found / "checkpoint-6", alone / "checkpoint-6")


def test_fsdp2_refuses_the_average_of_a_flow_before_anything_is_written(tmp_path, group):
    with pytest.raises(SystemExit, match=r"objective meanflow takes .* FSDP2 shards: use DDP"):
        train(tmp_path / "out", "fsdp2", "objective=meanflow", processes=1)
    assert not (tmp_path / "out").exists()


def test_a_finished_run_resumed_under_fsdp2_saves_its_model(alone, tmp_path, group):
    part = begun(tmp_path / "part", alone, step=6)
    train(part, "fsdp2", "resume_from_checkpoint=latest", processes=1)
    assert_same(part / "product", alone / "product", files=1)
