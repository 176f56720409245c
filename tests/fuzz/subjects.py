"""Make the good files that cases read: by the scripts themselves, once for all cases."""

import io
import os
import shutil
import tarfile
import traceback
from pathlib import Path

import datasets
import diffusers
import numpy as np
import torch
from PIL import Image

from .bases import BASES, CLASSIFY, ENCODE, FROM_MODEL, POWER
from .child import enter

CLASSES = ("ant", "bee", "cat")
CONFIG = """\
learning_rate: 1.0e-3
lr_scheduler: constant
random_flip: true
ema_sigma_rel: [0.05, 0.1]
guidance_scale: 1.5
"""


def build_template(folder: Path) -> None:
    """Fill a new folder with a run, a classifier, data sets, a cache, references and samples."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    in_child(partial, write_data)
    run(partial, "train", f"{POWER} --output_dir run")
    run(partial, "classify", f"{CLASSIFY} --output_dir classifier")
    run(partial, "encode", f"{ENCODE} --dataset images.parquet --output_dir cache")
    run(partial, "sample", "--model run --num_images 12 --num_inference_steps 2 --npz --output_dir sampled")
    (partial / "sampled" / "samples.npz").rename(partial / "samples.npz")
    (partial / "sampled" / "images").rename(partial / "flat")
    make = "--images digits --extractor pixels --num_features 40 --output"
    run(partial, "make_reference", f"{make} reference.safetensors")
    run(partial, "make_reference", f"{make} reference.npz")
    run(partial, "fid_of_model", f"{FROM_MODEL} --reference reference.safetensors --samples_dir fid.samples")
    for finished, unfinished, last in (("run", "unfinished", 6), ("classifier", "half_classifier", 3)):
        interrupt(partial / finished, partial / unfinished, last)
    for checkpoint in partial.glob("*/checkpoint-*"):
        if checkpoint.parent.name in ("run", "classifier"):
            shutil.rmtree(checkpoint)
    for name in ("sampled", "out", "home", "tmp"):
        shutil.rmtree(partial / name, ignore_errors=True)
    partial.rename(folder)


def run(folder: Path, base: str, words: str) -> None:
    """Run the script of a base in a child process."""
    in_child(folder, lambda: BASES[base].main(words.split()))


def in_child(folder: Path, work) -> None:
    """Call a function in a child process and a folder.

    Raises:
        RuntimeError: If it fails there.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            enter(folder)
            with (folder / "tmp" / "output").open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"The good files could not be made:\n{(folder / 'tmp' / 'output').read_text()[-3000:]}")


def write_data() -> None:
    """Write pictures of three classes as a folder, as parquet and as a tar, a tiny VAE, names and a config."""
    rows = []
    with tarfile.open("images.tar", "w") as tar:
        for i in range(12):
            label = i % 3
            pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            path = Path("images", CLASSES[label], f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": label})
            for ending, content in (("png", file.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    datasets.Dataset.from_list(rows, features=features).to_parquet("images.parquet")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.5,
    ).save_pretrained("vae")
    Path("names.txt").write_text("ant weaver ant\nbee bumblebee, bee\ncat tabby\n")
    Path("config.yaml").write_text(CONFIG)


def interrupt(finished: Path, unfinished: Path, last: int) -> None:
    """Copy a run as it was before its last checkpoint."""
    unfinished.mkdir()
    for path in finished.iterdir():
        if path.name.startswith("checkpoint-") and path.name != f"checkpoint-{last}":
            shutil.copytree(path, unfinished / path.name)
    for name in ("training_config.yaml", "log.jsonl"):
        shutil.copy(finished / name, unfinished / name)
    if (finished / "ema_snapshots").is_dir():
        shutil.copytree(finished / "ema_snapshots", unfinished / "ema_snapshots")
