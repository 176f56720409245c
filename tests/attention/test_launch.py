"""The choice of block sizes, with a clock that tells what the test wants."""

import json

import pytest
import torch

from sdt_diffusion.attention import launch as module
from sdt_diffusion.attention.formula import reference_attention
from sdt_diffusion.attention.launch import Launch, candidates, choose_launch
from sdt_diffusion.attention.pruning import TILE
from tests.attention.cases import fused, inputs, results

KERNELS = ("forward", "backward_query", "backward_key")
QUERY = torch.zeros(1, 1, 300, 64)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measure launches by a clock for which the last candidate is the fastest; return what was measured."""
    found = []

    def milliseconds(start, launch):
        start(launch)
        found.append(launch)
        return -len(found)

    monkeypatch.setenv("SDT_DIFFUSION_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_milliseconds", milliseconds)
    module._chosen.cache_clear()
    yield found
    module._chosen.cache_clear()


def choose(kernel="forward", query=QUERY, tokens=300, pruned=False, started=None):
    return choose_launch(kernel, query, tokens, pruned, [].append if started is None else started.append)


@pytest.mark.parametrize("setting", [None, "", "0"])
def test_nothing_is_measured_unless_asked_for(measured, monkeypatch, setting):
    monkeypatch.delenv("SDT_DIFFUSION_AUTOTUNE")
    if setting is not None:
        monkeypatch.setenv("SDT_DIFFUSION_AUTOTUNE", setting)
    assert choose() == Launch(128, 32, 4, 2)
    assert measured == []


def test_another_setting_is_refused(measured, monkeypatch):
    monkeypatch.setenv("SDT_DIFFUSION_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="SDT_DIFFUSION_AUTOTUNE must be 0 or 1, not 'yes'"):
        choose()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [1, 17, 49, 256, 4096])
def test_blocks_fit_the_tokens_and_those_of_pruned_attention_fit_its_tiles(kernel, tokens):
    for launch in candidates(kernel, 72, tokens):
        assert all(size >= 16 and size & (size - 1) == 0 for size in launch[:2])
        assert max(launch[:2]) <= max(16, 2 * tokens - 1)
    assert all(TILE % size == 0 for launch in candidates(kernel, 64, tokens, pruned=True) for size in launch[:2])


def test_a_size_is_measured_once_and_the_fastest_is_kept_for_later_runs(measured):
    started = []
    last = candidates("forward", 64, 300)[-1]
    assert choose(started=started) == last
    assert measured == started == candidates("forward", 64, 300)
    assert choose(tokens=512) == last  # of the same power of two
    module._chosen.cache_clear()  # as in a new process
    assert choose() == last
    assert measured == started


@pytest.mark.parametrize(
    "other", [{"tokens": 513}, {"pruned": True}, {"kernel": "backward_key"}, {"query": QUERY.bfloat16()}]
)
def test_another_size_is_measured_again_and_added(measured, other):
    choose()
    before = len(measured)
    choose(**other)
    assert len(measured) > before
    assert len(json.loads(module._file().read_text())) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": [1]}', '{"SIZE": [7, 7, 1, 1]}'])
def test_a_damaged_file_is_replaced(measured, content):
    choose()
    size = next(iter(module._chosen()))
    module._file().write_text(content.replace("SIZE", size))
    module._chosen.cache_clear()
    assert choose() == candidates("forward", 64, 300)[-1]
    assert json.loads(module._file().read_text())[size] == list(choose())


def test_a_folder_that_cannot_be_written_costs_a_warning_only(measured, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    chosen = choose()
    assert "cannot be written" in caplog.text
    assert choose() == chosen
    assert measured == candidates("forward", 64, 300)


def test_a_launch_that_the_gpu_refuses_is_never_chosen(monkeypatch):
    triton = pytest.importorskip("triton", reason="triton comes with torch on Linux only")

    def refuse(*args, **options):
        raise triton.TritonError("out of resource: shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", refuse)
    assert module._milliseconds(print, candidates("forward", 64, 300)[0]) == float("inf")


@pytest.mark.usefixtures("strict_memory")
def test_measuring_changes_no_result_beyond_rounding(measured):
    """Kernels can be started again: the gradients are those of one start."""
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    tensors = inputs((5, 7), batch=1, heads=1)
    expected = results(reference_attention, tensors, (5, 7), dtype=torch.float64)
    for _ in range(2):
        for mine, wanted in zip(results(fused, tensors, (5, 7)), expected, strict=True):
            torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)
    assert len(measured) == sum(len(candidates(kernel, 16, 35)) for kernel in KERNELS)
