"""Keep tens of thousands of samples in a folder, made by all processes; interrupted runs can be resumed."""

import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from ..data.raw_images import RawImages
from ..sdt import SDTPipeline
from ..sdt.vae import VAELayout
from ..utils.files import FolderLock, require_space, valid_json, write_atomically, write_json
from ..utils.fingerprint import differences, fingerprint
from ..utils.ranges import Range, check_value
from ..utils.reading import checksums, read_json
from .generate import describe_sampling, generate, share_of_process

MANIFEST_FILE = "manifest.json"
#: Ending of the file with the SHA-256 of a batch, in hexadecimal digits.
DIGEST_ENDING = ".sha256"
MAX_SAMPLES = 10_000_000


class SampleFolder(RawImages):
    """Samples in `.npy` files of one batch each with its SHA-256, and a manifest that says how they were made.

    Args:
        folder: The folder.

    Raises:
        ValueError: If it has no manifest, or samples are missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, str(folder)
        try:
            self.manifest = _read_manifest(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no samples with a {MANIFEST_FILE}: {error}") from error
        self.num_samples, self.batch_size = self.manifest["num_samples"], self.manifest["batch_size"]
        missing = missing_batches(folder, self.num_samples, self.batch_size)
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} of its files are missing or damaged, such as "
                f"{_batch_file(folder, missing[0]).name}; run the command that made it again."
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
        return {**super().describe(), "model_weights": made.pop("weights", None), **made}

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
    attention: dict[str, Any] | None = None,
) -> SampleFolder:
    """Fill a folder with one sample for each label, starting from what it holds already.

    Called by all processes, each of which makes its share of the batches. A batch is written when it is done: a run
    that is killed loses one batch on each process, and the same call makes the rest, as well as batches that have
    been damaged since. Other runs are kept out of the folder in the meantime.

    Args:
        folder: New, empty, or begun by the same call.
        pipe: The pipeline.
        class_labels: Label of each sample.
        sampling: `seed`, `guidance_scale` and `num_inference_steps`.
        batch_size: Samples at a time. Another size rounds differently, so all samples of a folder have the same.
        progress: Whether the main process shows a progress bar.
        attention: What was chosen for the pipeline's attention, for the manifest.

    Returns:
        The complete folder.

    Raises:
        OSError: If the disk cannot hold the samples.
        ValueError: If the folder holds something else, another process is writing to it, or a sample is not finite.
    """
    state = PartialState()
    lock = FolderLock(folder) if state.is_main_process else contextlib.nullcontext()
    labels = list(class_labels)
    manifest = {
        "weights": weights_of(pipe),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "scheduler": {"_class_name": type(pipe.scheduler).__name__, **json.loads(pipe.scheduler.to_json_string())},
        **sampling,
        **guider_record(pipe),
        **scaling_record(pipe, sampling),
        "sampler": describe_sampling(pipe, sampling),
        **(attention or {}),
        "batch_size": batch_size,
        "num_samples": len(labels),
        "class_labels": labels,
    }
    manifest = valid_json(json.loads(json.dumps(manifest)))  # as it will be read again
    check_value("num_samples", len(labels), (int,), Range(1, MAX_SAMPLES))
    with lock:
        if state.is_main_process:
            _claim(folder, manifest)
        state.wait_for_everyone()
        indices = share_of_process(len(labels), batch_size, missing_batches(folder, len(labels), batch_size))
        if state.is_main_process:
            num_bytes = bytes_per_sample(pipe, sampling)
            require_space(folder, state.num_processes * len(indices) * num_bytes, "The samples")
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
        with contextlib.closing(samples):  # an error ends the progress bar
            for index, image in samples:
                if not np.isfinite(image).all():
                    raise ValueError(f"Sample {index} (class {labels[index]}, seed {sampling['seed']}) is not finite.")
                made.append((image * 255).round().astype(np.uint8))
                if len(made) == batch_size or index == len(labels) - 1:
                    _write_batch(_batch_file(folder, index // batch_size), np.stack(made))
                    made = []
        state.wait_for_everyone()
    return SampleFolder(folder)


def is_sample_folder(folder: Path) -> bool:
    """Return whether `sample_into` made a folder, complete or not."""
    try:
        return "num_samples" in read_json(folder / MANIFEST_FILE, finite=False)
    except (OSError, ValueError):
        return False


def weights_of(pipe: SDTPipeline) -> str:
    """Return the fingerprint of the networks that make the samples."""
    return fingerprint(
        *(module for module in (pipe.transformer, pipe.vae, pipe.guide_transformer) if module is not None)
    )


def guider_record(pipe: SDTPipeline) -> dict[str, Any]:
    """Return the class and the options of the pipeline's guider under `guider`; nothing if it has none."""
    if pipe.guider is None:
        return {}
    return {"guider": {"_class_name": type(pipe.guider).__name__, **json.loads(pipe.guider.to_json_string())}}


def scaling_record(pipe: SDTPipeline, sampling: dict[str, Any]) -> dict[str, Any]:
    """Return how positions and distances are measured if the images have other sides than the trained ones."""
    if not {"height", "width"} & set(sampling):
        return {}
    names = ("pos_embed_scaling", "rotary_scaling", "decay_distance_scaling")
    return {name: pipe.transformer.config[name] for name in names}


def bytes_per_sample(pipe: SDTPipeline, sampling: Mapping[str, Any]) -> int:
    """Return the size of a sample's pixels.

    Args:
        pipe: The pipeline.
        sampling: What it is called with; without `height` and `width`, samples have the trained ones.
    """
    height, width = pipe.check_inputs(sampling.get("height"), sampling.get("width"))
    layout = None if pipe.vae is None else VAELayout.of(pipe.vae)
    return height * width * (pipe.transformer.config.in_channels if layout is None else layout.image_channels)


def missing_batches(folder: Path, num_samples: int, batch_size: int) -> list[int]:
    """Return the indices of the batches that are still to be made: those without a whole, undamaged file."""
    counts = [min(batch_size, num_samples - start) for start in range(0, num_samples, batch_size)]
    paths = [_batch_file(folder, batch) for batch in range(len(counts))]
    shapes = [_shape_of_batch(path) for path in paths]
    # Folders made before there were checksums have none.
    digests = [path.with_suffix(DIGEST_ENDING) for path in paths]
    marked = [batch for batch in range(len(counts)) if shapes[batch] and digests[batch].is_file()]
    for batch, found in zip(marked, checksums(paths[batch] for batch in marked), strict=True):
        if digests[batch].read_bytes() != found.encode():
            shapes[batch] = ()
    usual = Counter(shape[1:] for shape in shapes if shape).most_common(1)
    wanted = usual[0][0] if usual else ()
    return [batch for batch, count in enumerate(counts) if shapes[batch] != (count, *wanted)]


def _shape_of_batch(path: Path) -> tuple[int, ...]:
    """Return the shape of the images in a file; an empty one if it is missing, cut, or of another form."""
    try:
        batch: np.ndarray = np.load(path, mmap_mode="r") if path.is_file() else np.empty(0)
    except Exception:  # numpy raises anything for a damaged header
        return ()
    is_batch = batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[3] in (1, 3)
    return batch.shape if is_batch else ()


def _write_batch(path, batch):
    """Write a batch after its checksum, so that there is none without."""
    buffer = io.BytesIO()
    np.save(buffer, batch)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    write_atomically(path.with_suffix(DIGEST_ENDING), lambda partial: partial.write_text(digest))
    write_atomically(path, lambda partial: partial.write_bytes(buffer.getbuffer()))


def _batch_file(folder: Path, batch: int) -> Path:
    return folder / f"batch-{batch:06d}.npy"


def _read_manifest(folder):
    path = folder / MANIFEST_FILE
    manifest = valid_json(read_json(path, finite=False))  # DPM-Solver's config, in older folders, holds -Infinity
    for key in ("num_samples", "batch_size"):
        check_value(f"{key} of {path}", manifest.get(key), (int,), Range(1, MAX_SAMPLES))
    labels = manifest.get("class_labels")
    if not isinstance(labels, list) or len(labels) != manifest["num_samples"]:
        raise ValueError(f"{path} is damaged: it has no class label for each sample.")
    return manifest


def _claim(folder, manifest):
    path = folder / MANIFEST_FILE
    if path.is_file():
        found = differences(_read_manifest(folder), manifest, unquoted=("class_labels", "scheduler"))
        if found:
            raise ValueError(
                f"{folder} holds samples made with other settings ({'; '.join(found)}). Delete it, or give another "
                "folder."
            )
    elif any(not entry.name.startswith(".") for entry in folder.iterdir()):  # the lock, or what a killed run began
        raise ValueError(f"{folder} holds something other than samples: give another folder.")
    else:
        write_json(path, manifest, indent=None)
