"""Keep tens of thousands of samples in a folder, made by all processes; interrupted runs can be resumed."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from ..data.raw_images import RawImages
from ..sdt import SDTPipeline
from ..utils.files import write_atomically
from ..utils.fingerprint import differences, fingerprint
from .generate import describe_sampling, generate, share_of_process

MANIFEST_FILE = "manifest.json"


class SampleFolder(RawImages):
    """Samples in `.npy` files of one batch each, with a manifest that says how they were made.

    Args:
        folder: The folder.

    Raises:
        ValueError: If it has no manifest, or samples are missing.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, str(folder)
        try:
            self.manifest = json.loads((folder / MANIFEST_FILE).read_text())
            self.num_samples, self.batch_size = self.manifest["num_samples"], self.manifest["batch_size"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} holds no samples with a {MANIFEST_FILE}: {error}") from error
        missing = missing_batches(folder, self.num_samples, self.batch_size)
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} of its files are missing, such as {_batch_file(folder, missing[0]).name}; "
                "run the command that made it again."
            )

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> np.ndarray:
        batch = np.load(_batch_file(self.folder, index // self.batch_size), mmap_mode="r")
        return np.array(batch[index % self.batch_size])

    def describe(self) -> dict[str, Any]:
        """Return number, shape and format of the samples, and all that made them."""
        made = dict(self.manifest)
        del made["class_labels"], made["num_samples"]
        return {**super().describe(), "model_weights": made.pop("weights"), **made}

    def name_of(self, index: int) -> str:
        """Return the name of a sample in messages."""
        return f"sample {index} of {self.name}"


def sample_into(
    folder: Path,
    pipe: SDTPipeline,
    class_labels: Sequence[int],
    sampling: dict[str, Any],
    batch_size: int,
    progress: bool = True,
    attention_backend: str | None = None,
) -> SampleFolder:
    """Fill a folder with one sample for each label, starting from what it holds already.

    Called by all processes, each of which makes its share of the batches. A batch is written when it is done: a run
    that is killed loses one batch on each process, and the same call makes the rest.

    Args:
        folder: New, empty, or begun by the same call.
        pipe: The pipeline.
        class_labels: Label of each sample.
        sampling: `seed`, `guidance_scale` and `num_inference_steps`.
        batch_size: Samples at a time. Another size rounds differently, so all samples of a folder have the same.
        progress: Whether the main process shows a progress bar.
        attention_backend: The backend that was chosen for the pipeline, for the manifest.

    Returns:
        The complete folder.

    Raises:
        ValueError: If the folder holds something else, or a sample is not finite.
    """
    state = PartialState()
    labels = list(class_labels)
    manifest = {
        "weights": fingerprint(*(m for m in (pipe.transformer, pipe.vae) if m is not None)),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "scheduler": {"_class_name": type(pipe.scheduler).__name__, **json.loads(pipe.scheduler.to_json_string())},
        **sampling,
        "sampler": describe_sampling(pipe, sampling),
        **({"attention_backend": attention_backend} if attention_backend else {}),
        "batch_size": batch_size,
        "num_samples": len(labels),
        "class_labels": labels,
    }
    manifest = json.loads(json.dumps(manifest))
    if state.is_main_process:
        _claim(folder, manifest)
    state.wait_for_everyone()
    indices = share_of_process(len(labels), batch_size, missing_batches(folder, len(labels), batch_size))
    state.wait_for_everyone()  # write nothing before all processes have seen the same missing batches
    made = []
    samples = generate(
        pipe,
        [labels[i] for i in indices],
        batch_size=batch_size,
        indices=indices,
        output_type="np",
        progress=progress and state.is_main_process,
        **sampling,
    )
    for index, image in samples:
        if not np.isfinite(image).all():
            raise ValueError(f"Sample {index} (class {labels[index]}, seed {sampling['seed']}) is not finite.")
        made.append((image * 255).round().astype(np.uint8))
        if len(made) == batch_size or index == len(labels) - 1:
            batch = np.stack(made)
            write_atomically(_batch_file(folder, index // batch_size), partial(np.save, arr=batch))
            made = []
    state.wait_for_everyone()
    return SampleFolder(folder)


def is_sample_folder(folder: Path) -> bool:
    """Return whether `sample_into` made a folder, complete or not."""
    try:
        return "num_samples" in json.loads((folder / MANIFEST_FILE).read_text())
    except (OSError, ValueError):
        return False


def missing_batches(folder: Path, num_samples: int, batch_size: int) -> list[int]:
    """Return the indices of the batches that are still to be made: those without a complete file."""
    counts = [min(batch_size, num_samples - start) for start in range(0, num_samples, batch_size)]
    return [batch for batch, count in enumerate(counts) if not _is_complete(_batch_file(folder, batch), count)]


def _is_complete(path, count):
    try:
        return len(np.load(path, mmap_mode="r")) == count
    except (OSError, EOFError, ValueError):
        return False


def _batch_file(folder: Path, batch: int) -> Path:
    return folder / f"batch-{batch:06d}.npy"


def _claim(folder, manifest):
    path = folder / MANIFEST_FILE
    if path.is_file():
        there = json.loads(path.read_text())
        found = differences(there, manifest, unquoted=("class_labels", "scheduler"))
        if found:
            raise ValueError(
                f"{folder} holds samples made with other settings ({'; '.join(found)}). Delete it, or give another "
                "samples_dir."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something other than samples: give another samples_dir.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda partial: partial.write_text(json.dumps(manifest)))
