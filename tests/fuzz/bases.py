"""Good command lines, one or more for each script, which cases then change or whose files they damage."""

import functools
import importlib
from dataclasses import dataclass
from unittest import mock

from tests.scripts.forks import SCRIPTS


@dataclass(frozen=True)
class Base:
    """A command that completes.

    Attributes:
        script: Key of `SCRIPTS`.
        words: Its command line, as one text; a word holds no space.
        needs: Files and folders of the template that it needs beside it.
        reads: Patterns of the files whose damage matters to it.
        writes: Files and folders that it makes or changes.
    """

    script: str
    words: str
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ("out",)

    @property
    def argv(self) -> list[str]:
        return self.words.split()

    @property
    def main(self):
        return importlib.import_module(SCRIPTS[self.script]).main


PIPELINE = ("run/model_index.json", "run/transformer/*", "run/scheduler/*")
CLASSIFIER = ("classifier/*.json", "classifier/*.safetensors")
DIT = (
    '--model_overrides {"num_layers":1,"num_attention_heads":2,"attention_head_dim":16} --train_batch_size 8 '
    "--lr_warmup_steps 1 --checkpointing_steps 2 --logging_steps 2 --num_validation_images 6 --validation_steps 0 "
    "--num_inference_steps 2 --label_accuracy_samples 0 --cpu_threads 1 --report_to none --max_train_steps 6"
)
POWER = f"{DIT} --ema_profile power --ema_snapshot_steps 2"
CLASSIFY = (
    "--model_overrides "
    '{"hidden_sizes":[16,16,16,16],"depths":[1,1,1,1],"num_attention_heads":[2,2,2,2],"head_hidden_size":8} '
    "--model SDT-H-T --dataset images --resolution 32 --max_train_steps 3 --train_batch_size 4 --lr_warmup_steps 0 "
    "--checkpointing_steps 1 --logging_steps 1 --validation_fraction 0.5 --report_to none --cpu_threads 1"
)
ENCODE = "--pretrained_vae_model_name_or_path vae --resolution 16 --shard_size 4 --batch_size 4 --dtype float32"
PIXELS = "--extractor pixels --kid_subset_size 8 --num_features 40 --kid_subsets 4"
FROM_MODEL = f"--model run --num_samples 24 --batch_size 8 --num_inference_steps 2 {PIXELS} --output out/fid.json"

BASES = {
    "train": Base("train/train_dit.py", f"{POWER} --output_dir out --resume_from_checkpoint latest"),
    "train_on_images": Base(
        "train/train_dit.py",
        f"{DIT} --dataset images --class_names names.txt --model SDT-S/2 --resolution 16 --config config.yaml "
        "--output_dir out --resume_from_checkpoint latest",
        needs=("images", "names.txt", "config.yaml"),
        reads=("images/*/*", "names.txt", "config.yaml"),
    ),
    "train_on_cache": Base(
        "train/train_dit.py",
        f"{DIT} --dataset cache --model SDT-S/2 --output_dir out --resume_from_checkpoint latest",
        needs=("cache", "vae"),
        reads=("cache/*.json", "cache/*.safetensors", "cache/*.safetensors", "vae/*"),
    ),
    "train_from_weights": Base(
        "train/train_dit.py",
        f"{DIT} --init_from run --output_dir out --resume_from_checkpoint latest",
        needs=("run",),
        reads=("run/model_index.json", "run/transformer/*"),
    ),
    "resume": Base(
        "train/train_dit.py",
        f"{POWER} --output_dir unfinished --resume_from_checkpoint latest",
        needs=("unfinished",),
        reads=(
            *("unfinished/checkpoint-4/*", "unfinished/checkpoint-4/*/*", "unfinished/training_config.yaml"),
            "unfinished/log.jsonl",
        ),
        writes=("unfinished",),
    ),
    "resume_classifier": Base(
        "train/train_classifier.py",
        f"{CLASSIFY} --output_dir half_classifier --resume_from_checkpoint latest",
        needs=("half_classifier", "images"),
        reads=(
            *("half_classifier/checkpoint-2/*", "half_classifier/checkpoint-2/*/*", "half_classifier/*.yaml"),
            "half_classifier/log.jsonl",
        ),
        writes=("half_classifier",),
    ),
    "classify": Base(
        "train/train_classifier.py",
        f"{CLASSIFY} --output_dir out --resume_from_checkpoint latest",
        needs=("images",),
        reads=("images/*/*",),
    ),
    "probe": Base(
        "train/train_classifier.py",
        "--config digits_probe --model run --max_train_steps 2 --train_batch_size 16 --report_to none --cpu_threads 1 "
        "--output_dir out --resume_from_checkpoint latest",
        needs=("run",),
        reads=PIPELINE,
    ),
    "encode": Base(
        "train/encode_latents.py",
        f"{ENCODE} --dataset images.parquet --output_dir out",
        needs=("images.parquet", "vae"),
        reads=("images.parquet", "vae/*"),
    ),
    "encode_folder": Base(
        "train/encode_latents.py",
        f"{ENCODE} --dataset images --output_dir out",
        needs=("images", "vae"),
        reads=("images/*/*", "vae/*"),
    ),
    "encode_tar": Base(
        "train/encode_latents.py",
        f"{ENCODE} --dataset images.tar --streaming True --output_dir out",
        needs=("images.tar", "vae"),
        reads=("images.tar",),
    ),
    "verify": Base(
        "train/encode_latents.py",
        "--output_dir cache --verify True",
        needs=("cache",),
        reads=("cache/*.json", "cache/*.safetensors"),
        writes=(),
    ),
    "reconstruct": Base(
        "train/reconstruct_ema.py",
        "--run run --sigma_rel 0.12 --output_dir out",
        needs=("run",),
        reads=(*PIPELINE, "run/ema_snapshots/*", "run/ema_snapshots/*", "run/training_run.json"),
    ),
    "share": Base(
        "train/share.py",
        "--folder run --license mit",
        needs=("run",),
        reads=("run/*.json", "run/*.jsonl", "run/*.yaml", "run/transformer/config.json"),
        writes=("run",),
    ),
    "sample": Base(
        "sample/sample.py",
        "--model run --num_images 12 --num_inference_steps 2 --batch_size 5 --npz --output_dir out",
        needs=("run",),
        reads=PIPELINE,
    ),
    "gallery": Base(
        "sample/gallery.py",
        "--model run --classes 1 2 --columns 2 --num_inference_steps 2 --vary guidance_scale=1,2 --output_dir out",
        needs=("run",),
        reads=PIPELINE,
    ),
    "fid_of_model": Base(
        "eval/fid.py",
        f"{FROM_MODEL} --reference reference.npz",
        needs=("run", "reference.npz"),
        reads=(*PIPELINE, "reference.npz", "reference.npz"),
    ),
    "fid_of_kept_samples": Base(
        "eval/fid.py",
        f"{FROM_MODEL} --reference reference.safetensors --samples_dir fid.samples",
        needs=("run", "fid.samples", "reference.safetensors"),
        reads=("fid.samples/*", "reference.safetensors"),
        writes=("out", "fid.samples"),
    ),
    "fid_of_images": Base(
        "eval/fid.py",
        f"--samples flat --reference digits --image_mode L {PIXELS} --metrics fid --output out/fid.json",
        needs=("flat",),
        reads=("flat/*",),
    ),
    "fid_of_npz": Base(
        "eval/fid.py",
        f"--samples samples.npz --reference images --resolution 8 {PIXELS} --metrics fid --output out/fid.json",
        needs=("samples.npz", "images"),
        reads=("samples.npz", "samples.npz", "images/*/*"),
    ),
    "sweep": Base(
        "eval/sweep.py",
        "--model run --num_samples 12 --num_inference_steps 2 --axes guidance_scale=1,2 --reference "
        f"reference.safetensors {PIXELS} --metrics fid --output_dir out",
        needs=("run", "reference.safetensors"),
        reads=(*PIPELINE, "reference.safetensors"),
    ),
    "make_reference": Base(
        "eval/make_reference.py",
        "--images images --resolution 8 --extractor pixels --output out/reference.safetensors",
        needs=("images",),
        reads=("images/*/*",),
    ),
    "accuracy": Base(
        "eval/accuracy.py",
        "--model classifier --dataset images --batch_size 5 --output out/accuracy.json",
        needs=("classifier", "images"),
        reads=(*CLASSIFIER, "images/*/*"),
    ),
    "label_accuracy": Base(
        "eval/label_accuracy.py",
        "--model run --num_images 12 --num_inference_steps 2",
        needs=("run",),
        reads=PIPELINE,
        writes=(),
    ),
    "decay_of_model": Base(
        "eval/decay_maps.py",
        "--model run --timestep 500 --class_label 3 --num_inference_steps 2 --output out/decay.png",
        needs=("run",),
        reads=PIPELINE,
    ),
    "decay_of_classifier": Base(
        "eval/decay_maps.py",
        "--model classifier --image images/ant/0.png --output out/decay.png",
        needs=("classifier", "images"),
        reads=(*CLASSIFIER, "images/ant/0.png"),
    ),
}


class _Captured(Exception):
    pass


@functools.cache
def argument_types(script: str) -> tuple[type, ...]:
    """Return the dataclasses of a script's arguments: those that its `main` hands to `parse_arguments`."""
    module = importlib.import_module(SCRIPTS[script])

    def capture(types, *args, **kwargs):
        raise _Captured(tuple(types))

    with mock.patch.object(module, "parse_arguments", capture):
        try:
            module.main([])
        except _Captured as captured:
            return captured.args[0]
    raise AssertionError(f"{script} does not call parse_arguments")
