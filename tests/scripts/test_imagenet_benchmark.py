"""benchmarks/imagenet.py: that its figures are those of known answers."""

import sys

import pytest

from tests.scripts.process import load_main


@pytest.fixture(scope="module")
def benchmark():
    return sys.modules[load_main("benchmarks/imagenet.py").__module__]


def test_training_and_sampling_count_every_pass(benchmark):
    # Three forward passes of two operations a multiply-add; two network evaluations a step.
    assert benchmark.training_flops(118.64e9, 256 * 7_000_000) == pytest.approx(1.2756e21, rel=1e-4)
    assert benchmark.sampling_flops(118.64e9, steps=250, samples=50_000) == pytest.approx(5.932e18, rel=1e-4)


def test_the_cache_holds_mean_and_std_of_two_mirrors(benchmark):
    assert benchmark.latent_cache_bytes(256, images=1) == 4 * 32 * 32 * 2 * 2 * 2 + 8
    assert benchmark.latent_cache_bytes(512, images=10) == 10 * (4 * 64 * 64 * 2 * 2 * 2 + 8)


def test_activations_of_two_blocks_predict_those_of_twelve(benchmark):
    def kept(batch_size):
        return benchmark.kept_bytes("SDT-S/2", 128, "context", 12, batch_size)

    assert benchmark.activation_bytes("SDT-S/2", 128, "context")[0] == kept(2) - kept(1)


def test_the_tables_are_printed(benchmark, capsys):
    benchmark.main(["--models", "SDT-S/2", "--resolutions", "256", "--tflops", "50", "--no_activations"])
    printed = capsys.readouterr().out
    assert "| SDT-S/2 | 256 | 32.9M | 6.06 | 6.05 |" in printed
    assert "hours at 50 TFLOP/s" in printed
