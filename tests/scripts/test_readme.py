"""Run the README's commands and programs, in their order, on small settings and in this process."""

import re
import shlex

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DiffusionPipeline

import sdt_diffusion
from sdt_diffusion.convert.__main__ import main as convert
from tests.scripts.process import ROOT, load_main

BLOCK = re.compile(r"(?:<!-- ([\w ]+) -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
#: Further flags that make a script's run short.
SMALL = {
    "train/train_dit.py": (
        "--max_train_steps 4 --lr_warmup_steps 1 --num_validation_images 10 --num_inference_steps 2 "
        "--label_accuracy_samples 10 --cpu_threads 1"
    ),
    "train/train_classifier.py": "--max_train_steps 2 --lr_warmup_steps 1",
    "sample/sample.py": "--num_images 4",
    "sample/gallery.py": "--columns 1 --classes 3",
    "eval/fid.py": "--num_samples 8",
}


def blocks():
    return BLOCK.findall((ROOT / "README.md").read_text())


def run_command(words, folder):
    """Run one of the README's commands with its outputs in a folder."""
    words = words[2:] if words[:2] == ["accelerate", "launch"] else words[1:]
    script, *arguments = words
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    arguments = [word.replace("outputs/", f"{folder}/") for word in arguments]
    if script.startswith("train/") and "--output_dir" not in arguments:
        default = (
            "digits" if "dit" in script else "digits_probe" if "digits_probe" in arguments else "digits_classifier"
        )
        arguments += ["--output_dir", f"{folder}/{default}"]
        arguments += ["--model", f"{folder}/digits"] if "digits_probe" in arguments else []
    load_main(script)([*arguments, *shlex.split(SMALL.get(script, ""))])


def test_every_block_is_run_by_this_test_or_is_the_test_command():
    assert [mark for mark, _, _ in blocks()].count("") == 1  # the first command, whose second half is run below
    assert {mark for mark, _, _ in blocks()} == {"", "test command", "commands", "python"}


def test_the_lines_of_the_table_have_flags_that_exist_and_pages(capsys):
    rows = re.findall(r"^\| .+ \| `(.+)` \| \[\w+\]\((.+)\) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 7
    for line, page in rows:
        assert (ROOT / page).is_file()
        if line.startswith("pipe."):
            name = re.search(r"(?:sdt_diffusion|^pipe)\.(\w+)\(", line)[1]
            assert hasattr(sdt_diffusion, name) or hasattr(sdt_diffusion.SDTPipeline, name)
            continue
        main = convert if line.startswith("sdt-diffusion convert") else load_main(line.split()[1])
        with pytest.raises(SystemExit):
            main(["--help"])
        known = capsys.readouterr().out
        assert all(re.search(rf"{flag}\b", known) for flag in re.findall(r"--\w+", line))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_commands_and_programs_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    seen = []
    for mark, language, text in blocks():
        if language == "python":
            exec(text.replace("outputs/", f"{tmp_path}/"), {})
            continue
        if mark == "test command":
            continue
        for line in text.replace("\\\n", " ").splitlines():
            command = line.split("&&")[-1].strip()
            run_command(shlex.split(command), tmp_path)
            seen.append(command)
    assert len(seen) == 8
    output = capsys.readouterr().out
    assert "of 10 samples are classified as their label" in output
    assert "FD(pixels)-8" in output
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "digits")
    assert pipe.sampling_settings() == {"guidance_scale": 1.5, "num_inference_steps": 2}
    for path in (
        "digits/decay.png",
        "digits/fid.png",
        "digits_probe/config.json",
        "threes_and_sevens/grid.png",
        "gallery/index.html",
    ):
        assert (tmp_path / path).is_file()
