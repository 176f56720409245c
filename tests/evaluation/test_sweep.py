import json
import re

import pytest
from PIL import Image

from sdt_diffusion import SDTPipeline
from sdt_diffusion.data.raw_images import RawImageArguments
from sdt_diffusion.evaluation import sweep
from sdt_diffusion.evaluation.fid import FidArguments, FidSamplingArguments, compare
from sdt_diffusion.evaluation.sweep import Sweep, SweepArguments
from sdt_diffusion.evaluation.sweep_axes import GOLDEN, golden_section, parse_axes
from sdt_diffusion.evaluation.sweep_report import lines_of
from sdt_diffusion.metrics.extractors import build_extractor
from sdt_diffusion.sampling.folder import weights_of
from sdt_diffusion.sampling.generate import describe_sampling
from sdt_diffusion.sampling.settings import load_pipeline
from tests.scripts.process import ROOT, fork_ranks

PIXELS = build_extractor("pixels")
SCALES = "guidance_scale=1,2"


@pytest.fixture
def model(make_pipe, make_model, tmp_path):
    make_pipe(transformer=make_model(in_channels=1), guidance_scale=1.5).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(model, tmp_path):
    """Sweep over axes of the tiny model; return the sweep and its best cell."""

    def call(*axes, sampling=None, image_args=None, **arguments):
        given = {"output_dir": tmp_path / "out", "reference": "digits", "metrics": ["fid"], **arguments}
        args = SweepArguments(axes=list(axes), **given)
        base = {"model": str(model), "num_samples": 10, "num_inference_steps": 2, **(sampling or {})}
        base = {name: value for name, value in base.items() if not any(axis.startswith(f"{name}=") for axis in axes)}
        found = Sweep(args, FidSamplingArguments(**base), PIXELS, image_args or RawImageArguments())
        return found, found.run()

    return call


@pytest.fixture
def calls(monkeypatch):
    """Replace the evaluation by a parabola in the guidance scale with its minimum at 2; list its calls."""
    made = []

    def describe(sampling):
        pipe = load_pipeline(sampling, "cpu")
        return describe_sampling(pipe, sampling.settings(pipe))

    def parabola(args, sampling, *_):
        made.append(sampling)
        weights = weights_of(SDTPipeline.from_pretrained(sampling.model))
        record = {
            **{"fid": (sampling.guidance_scale - 2) ** 2 + 1, "labels": {"fid": "FD-10"}, "warnings": ["A note."]},
            **{"samples": {"model_weights": weights, "count": 10, "sampler": describe(sampling)}},
            **{"reference": {"count": 5, "path": args.reference}},
        }
        args.output.write_text(json.dumps(record))

    monkeypatch.setattr(sweep, "compare", parabola)
    return made


def cells(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}


def test_values_have_the_types_of_the_settings():
    found = parse_axes(
        [
            *(
                "guidance_scale=1,2.5",
                "num_inference_steps=5",
                "guidance=none,decay",
                "scheduler=none,UniPC",
                "seed=0,1",
            ),
            *("guidance_interval=none,0.2:0.8", "rotary_scaling=none,ntk", "decay_distance_scaling=none,true,false"),
        ]
    )
    assert found == {
        "guidance_scale": [1.0, 2.5],
        "num_inference_steps": [5],
        "guidance": [None, "decay"],
        "scheduler": [None, "UniPC"],
        "seed": [0, 1],
        "guidance_interval": [None, [0.2, 0.8]],
        "rotary_scaling": ["none", "ntk"],
        "decay_distance_scaling": [None, True, False],
    }


@pytest.mark.parametrize("evaluations", [2, 3, 9])
@pytest.mark.parametrize("minimum", [0.0, 1.234, 3.9, 4.0])
def test_golden_sections_enclose_the_minimum(minimum, evaluations):
    """n evaluations leave an interval of 0.618^(n - 1), with the best argument inside."""
    tried = []

    def parabola(x):
        tried.append(x)
        return (x - minimum) ** 2

    found = golden_section(parabola, 0.0, 4.0, evaluations)
    assert tried[:2] == [0.0, 4.0]  # no guidance is compared, and the line of tried scales reaches the ends
    assert len(tried) == evaluations + 2
    assert abs(found - minimum) <= 4 * GOLDEN ** (evaluations - 1) + 1e-12
    assert found == min(tried, key=lambda x: abs(x - minimum))


def test_each_cell_has_the_numbers_of_an_evaluation_by_itself(run, model, tmp_path):
    found, best = run(SCALES, "num_inference_steps=1,3")
    results = {cell.values["guidance_scale"]: record for cell, record in found.finished.values()}
    assert len(found.finished) == len(cells(tmp_path / "out")) == 4
    args = FidArguments(reference="digits", metrics=["fid"], output=tmp_path / "one.json")
    sampling = FidSamplingArguments(model=str(model), num_samples=10, guidance_scale=2, num_inference_steps=3)
    compare(args, sampling, PIXELS, RawImageArguments())
    assert results[2]["fid"] == json.loads((tmp_path / "one.json").read_text())["fid"]
    assert [cell.evaluations for cell, _ in found.finished.values()] == [1, 3, 2, 6]
    assert not list((tmp_path / "out" / "samples").iterdir())
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert "| guidance_scale | num_inference_steps | network evaluations | FD(pixels)-10 | cell |" in table
    values = [float(line.split("|")[4]) for line in table.splitlines()[4:] if line.startswith("| ")]
    assert values == sorted(values)
    assert f"- Best: {best}." in table
    assert "- Reference: 1797 images, digits." in table
    for name in ("evaluations.png", "guidance.png"):
        assert Image.open(tmp_path / "out" / name).size == (960, 600)


def test_a_sweep_that_was_killed_continues_and_takes_more_values(run, tmp_path, monkeypatch):
    def killed(args, *rest):
        compare(args, *rest)
        if len(cells(tmp_path / "out")) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "compare", killed)
        with pytest.raises(KeyboardInterrupt):
            run("guidance_scale=1,1.5,2", keep_samples=True)
    kept = cells(tmp_path / "out")
    assert len(kept) == 2
    reference = (tmp_path / "out" / "reference.safetensors").stat().st_mtime_ns
    found, _ = run("guidance_scale=1,1.5,2,3")
    assert len(found.finished) == len(cells(tmp_path / "out")) == 4
    assert kept.items() <= cells(tmp_path / "out").items()
    assert (tmp_path / "out" / "reference.safetensors").stat().st_mtime_ns == reference
    monkeypatch.setattr(sweep, "compare", lambda *_: pytest.fail("nothing is computed twice"))
    run("guidance_scale=1,1.5,2,3")


def test_a_folder_of_other_settings_is_refused(run, model, calls, make_pipe, make_model):
    run(SCALES)
    for change, message in (
        ({"sampling": {"seed": 1}}, "seed: 0 there, 1 now"),
        ({"sampling": {"num_samples": 20}}, "num_samples: 10 there, 20 now"),
        ({"metrics": ["fid", "recall"]}, "metrics: "),
        ({"kid_subsets": 7}, "kid_subsets: 100 there, 7 now"),
    ):
        with pytest.raises(ValueError, match=rf"out holds another sweep \({message}.*: give another output_dir"):
            run(SCALES, **change)
    run(SCALES, "seed=0,1")  # one more axis is no other setting
    assert len(calls) == 4
    make_pipe(transformer=make_model(in_channels=1, num_layers=1)).save_pretrained(model)
    with pytest.raises(ValueError, match=r"json is of another model, or of other defaults .*weights: "):
        run(SCALES)


@pytest.mark.parametrize("file", ["cells/a.jpg", "reference.safetensors", "model_index.json"])
def test_a_folder_of_other_files_is_left_alone(run, calls, tmp_path, file):
    (tmp_path / "photos" / "cells").mkdir(parents=True)
    (tmp_path / "photos" / file).touch()
    with pytest.raises(ValueError, match="photos holds something other than a sweep"):
        run(SCALES, output_dir=tmp_path / "photos")
    assert [path for path in (tmp_path / "photos").rglob("*") if path.is_file()] == [tmp_path / "photos" / file]
    assert calls == []


def test_a_model_without_a_null_class_is_swept_without_guidance(run, make_pipe, make_model, tmp_path):
    make_pipe(transformer=make_model(in_channels=1, class_dropout_prob=0.0)).save_pretrained(tmp_path / "model")
    found, _ = run("num_inference_steps=1,2", sampling={"guidance_scale": 1.0})
    assert [cell.evaluations for cell, _ in found.finished.values()] == [1, 2]
    with pytest.raises(ValueError, match="guidance_scale=2: guidance_scale 2 needs the null class"):
        run("guidance_scale=1,2")


def test_settings_without_effect_make_no_cells(run, calls):
    found, _ = run(
        "guidance_scale=0,1,2", "guidance=cfg,decay", "decay_guidance_factor=2,4", "guidance_interval=none,0:1"
    )
    unguided = [each for each in calls if each.guidance_scale == 1]
    assert len(unguided) == 1
    assert (unguided[0].guidance, unguided[0].decay_guidance_factor, unguided[0].guidance_interval) == (None,) * 3
    kinds = [(each.guidance, each.decay_guidance_factor, each.guidance_interval) for each in calls[1:]]
    factors = {"cfg": [None], "decay": [2.0, 4.0]}
    expected = [(kind, factor, each) for kind in factors for factor in factors[kind] for each in (None, [0.0, 1.0])]
    assert sorted(kinds, key=str) == sorted(expected, key=str)
    assert len(found.finished) == len(calls)


def test_a_search_finds_the_best_scale_and_continues(run, calls, monkeypatch, capsys):
    search = {"search": ["guidance_scale", "1", "4"], "search_evaluations": 9}
    _, best = run("num_inference_steps=1,2", **search)
    assert len(calls) == 22
    assert [call.guidance_scale for call in calls[:2]] == [1, 4]
    assert best.values["guidance_scale"] == pytest.approx(2, abs=3 * GOLDEN**8)
    assert best.evaluations == 2  # the cheaper one of two that are equally good
    assert "100% done" not in capsys.readouterr().out
    monkeypatch.setattr(sweep, "compare", lambda *_: pytest.fail("nothing is computed twice"))
    assert run("num_inference_steps=1,2", **search)[1] == best


def test_pictures_of_a_search_have_one_line_for_all_tried_scales(run, calls):
    found, _ = run("num_inference_steps=2,4", search=["guidance_scale", "1", "3"], search_evaluations=2)
    results = sorted(found.finished.values(), key=lambda result: result[1]["fid"])
    lines = lines_of(results, "fid", "num_inference_steps", lambda cell: cell.evaluations, ["guidance_scale"])
    (line,) = lines.values()  # over evaluations; without guidance, a step is one and not two
    assert {x: len(values) for x, values in line.items()} == {2: 1, 4: 4, 8: 3}
    assert all(values == sorted(values) for values in line.values())
    lines = lines_of(results, "fid", "guidance_scale", lambda cell: cell.values["guidance_scale"], ["guidance_scale"])
    assert [len(line) for line in lines.values()] == [4, 4]


def test_larger_is_better_for_some_metrics(run, tmp_path):
    found, best = run("guidance_scale=1,3", metrics=["fid", "recall", "precision"], best_by="recall")
    recalls = {cell.name: record["recall"] for cell, record in found.finished.values()}
    assert recalls[best.name] == max(recalls.values())


def test_the_best_settings_become_those_of_the_pipeline(run, model, calls):
    files = {path: path.read_bytes() for path in model.rglob("*.safetensors")}
    axes = ("guidance_scale=1.5,2,3", "guidance=decay", "scheduler=UniPCMultistepScheduler", "num_inference_steps=3")
    run(*axes, save_best=True)
    pipe = SDTPipeline.from_pretrained(model)
    assert pipe.sampling_settings() == {"guidance_scale": 2, "num_inference_steps": 3}
    assert pipe.guider.config.decay_factor == 4
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    assert files == {path: path.read_bytes() for path in model.rglob("*.safetensors")}
    run("guidance_scale=1,2", save_best=True, output_dir=model.parent / "again")
    assert SDTPipeline.from_pretrained(model).sampling_settings()["num_inference_steps"] == 2


def test_other_grids_are_compared_with_references_of_their_size(run, tmp_path):
    found, _ = run(
        "decay_distance_scaling=false,true",
        sampling={"height": 12, "width": 12},
        image_args=RawImageArguments(resolution=12),
        keep_samples=True,
    )
    records = [record for _, record in found.finished.values()]
    assert [record["samples"]["decay_distance_scaling"] for record in records] == [False, True]
    assert {tuple(record["samples"]["shape"]) for record in records} == {(12, 12, 1)}
    assert records[0]["fid"] != records[1]["fid"]
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 2


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        (["guidance_scale"], {}, "axes must be like guidance_scale=1,1.5,2, not 'guidance_scale'"),
        (["guidance_scale="], {}, "axes must be like"),
        (["guidance_scale=1,,2"], {}, "axes: guidance_scale must be given, not ''"),
        (["guidance_scale=1,x"], {}, "axes: 'x' is no value of guidance_scale"),
        (["guidance_scale=nan"], {}, "guidance_scale=nan: guidance_scale must be a finite number"),
        (["guidance_scale=-1"], {}, "guidance_scale must be at least 0"),
        (["guidance_scale=1,1.0"], {}, "axes: guidance_scale has the value 1 twice"),
        ([SCALES, SCALES], {}, "axes: guidance_scale is there twice"),
        (["scale=1,2"], {}, "axes: scale is no setting that can differ between cells; those are attention_backend,"),
        (["num_samples=10,20"], {}, "axes: num_samples is no setting that can differ"),
        (["guidance=cfg,fog"], {}, "axes: guidance must be cfg or .* or decay, not 'fog'"),
        (["decay_distance_scaling=1"], {}, "axes: decay_distance_scaling must be true or false, not '1'"),
        (["num_inference_steps=1.5"], {}, "axes: '1.5' is no value of num_inference_steps"),
        (["num_inference_steps=0,1"], {}, "num_inference_steps must be at least 1"),
        (["guidance_interval=0.1:0.2:0.3"], {}, "guidance_interval=0.1:0.2:0.3: guidance_interval"),
        (["guidance_interval=none,0.91:0.92"], {}, "guidance_interval=0.91:0.92: .*holds none of the 2 steps"),
        (["scheduler=DDIMScheduler"], {}, "scheduler=DDIMScheduler: 'DDIMScheduler' is not a scheduler for this"),
        (["model=no/such,model"], {}, "model=no/such"),
        (["guidance=autoguidance"], {}, "guidance autoguidance needs a guide_model"),
        (["rotary_scaling=ntk"], {}, "the model has no rotary embedding"),
        ([SCALES], {"sampling": {"guidance_scale": 2.0}}, "guidance_scale is one of the axes: leave out the flag"),
        ([SCALES], {"sampling": {"model": None}}, "Give a model"),
        ([SCALES], {"sampling": {"samples_dir": "a"}}, "samples_dir is the sweep's own"),
        ([SCALES], {"sampling": {"height": 9}}, "An image of 9x8 is not divisible into patches"),
        (
            [SCALES],
            {"sampling": {"height": 12}},
            "digits: its pool features have 192 dimensions, those of the samples 288",
        ),
        ([SCALES], {"reference": "no/such"}, "no/such"),
        ([SCALES], {"best_by": "recall"}, "best_by must be one of the metrics, fid, not 'recall'"),
        ([SCALES], {"metrics": [], "best_by": "sfid"}, "sfid needs spatial features"),
        ([SCALES], {"metrics": ["fid", "kid"]}, "kid takes at least 1000 samples"),
        ([SCALES], {"save_best": True, "sampling": {"model": "hub/name"}}, "which hub/name is not"),
        ([SCALES], {"save_best": True, "sampling": {"height": 12}}, "leave out height and width"),
        ([], {"search": ["seed", "1", "2"]}, "search must be one of guidance_scale,"),
        ([], {"search": ["guidance_scale", "1"]}, "and two ends, not 'guidance_scale 1'"),
        ([], {"search": ["guidance_scale", "4", "1"]}, "the lower one first"),
        ([], {"search": ["guidance_scale", "1", "nan"]}, "must be two numbers"),
        ([], {"search": ["guidance_scale", "1", "5000"]}, "guidance_scale must be at least 0 and at most 1000"),
        ([SCALES], {"search": ["guidance_scale", "1", "2"]}, "guidance_scale is one of the axes already"),
    ],
)
def test_bad_requests_are_refused_before_the_first_cell(run, calls, tmp_path, axes, changes, message):
    if changes.get("sampling", {}).get("guidance_scale"):
        args = SweepArguments(axes=axes, output_dir=tmp_path / "out", reference="digits")
        with pytest.raises(ValueError, match=message):
            Sweep(args, FidSamplingArguments(model="m", guidance_scale=2.0), PIXELS, RawImageArguments())
        return
    with pytest.raises(ValueError, match=message):
        run(*axes, **changes)
    assert calls == []
    assert not (tmp_path / "out").exists()


def test_processes_share_the_work_and_change_no_digit(run, model, tmp_path):
    found, _ = run(SCALES, sampling={"batch_size": 3})
    flags = f"--num_samples 10 --num_inference_steps 2 --batch_size 3 --extractor pixels --axes {SCALES}".split()
    flags += ["--reference", "digits", "--metrics", "fid", "--model", model, "--output_dir", tmp_path / "two"]
    result = fork_ranks("eval/sweep.py", *flags)
    assert result.stdout.count("Best: guidance_scale") == 1
    for cell, record in found.finished.values():
        assert json.loads((tmp_path / "two" / "cells" / f"{cell.name}.json").read_text())["fid"] == record["fid"]


PAGE = (ROOT / "docs" / "sweeping.md").read_text()
COMMANDS = re.findall(r"python eval/sweep.py ((?:\\\n|.)*)", PAGE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_documentation_run(calls, model, tmp_path, command):
    for old, new in (("\\\n", ""), ("outputs/digits", str(model)), ("outputs/", f"{tmp_path}/")):
        command = command.replace(old, new)
    sweep.main(command.split())
    (table,) = tmp_path.glob("*/sweep.md")
    assert table.read_text().count("\n| ") == 2 + len(calls)


def test_the_axes_of_the_documentation_are_axes():
    axes = [word for word in re.findall(r"`([a-z_]+=\S+)`", PAGE) if "..." not in word and "VALUE" not in word]
    assert len(axes) > 8
    assert list(parse_axes(axes)) == [axis.partition("=")[0] for axis in axes]
