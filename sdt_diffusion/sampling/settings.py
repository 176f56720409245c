"""Sampling arguments shared by all scripts, and the pipeline and classes that they name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..attention import BACKENDS
from ..attention.dispatch import MAX_PRUNE_EPS, PRUNES
from ..attention_processor import set_decay_backend
from ..sdt import SDTPipeline, SDTTransformer2DModel
from ..sdt.loading import open_pipeline
from ..sdt.pipeline_sdt import DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_INFERENCE_STEPS
from ..sdt.schedulers import GUIDANCE, STEPS, swap_scheduler
from ..utils.ranges import RANGE_KEY, CheckedArguments, a_seed, between

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class SamplerArguments(CheckedArguments):
    """How a model is sampled; training takes these and saves them in the pipeline."""

    scheduler: str | None = field(
        default=None,
        metadata={"help": "Class name of another diffusers scheduler than the pipeline's.", "resumable": True},
    )
    num_inference_steps: int | None = field(
        default=None,
        metadata={
            "help": f"Sampling steps; those saved in the pipeline by default, else {DEFAULT_NUM_INFERENCE_STEPS}.",
            "resumable": True,
            RANGE_KEY: STEPS,
        },
    )
    guidance_scale: float | None = field(
        default=None,
        metadata={
            "help": "Classifier-free guidance, 1 for none; that saved in the pipeline by default, else "
            f"{DEFAULT_GUIDANCE_SCALE:g}.",
            "resumable": True,
            RANGE_KEY: GUIDANCE,
        },
    )
    attention_backend: str | None = field(
        default=None,
        metadata={
            "help": f"How attention is computed: {', '.join(BACKENDS)}, or a backend of diffusers such as native; the "
            "best for the device by default.",
            "resumable": True,
        },
    )
    attention_prune_eps: float = field(
        default=0.0,
        metadata={
            "help": "Share of each token's softmax that attention may skip, so that long grids with local decay cost "
            f"less: 1e-4, say; 0 for none. Only {' and '.join(PRUNES)} do.",
            "resumable": True,
        }
        | between(0, MAX_PRUNE_EPS),
    )

    def with_defaults(self) -> "SamplerArguments":
        """Return a copy that names guidance and steps, for a pipeline that has none saved yet."""
        guidance, steps = self.guidance_scale, self.num_inference_steps
        return replace(
            self,
            guidance_scale=DEFAULT_GUIDANCE_SCALE if guidance is None else guidance,
            num_inference_steps=DEFAULT_NUM_INFERENCE_STEPS if steps is None else steps,
        )

    def apply_to(self, pipe: SDTPipeline) -> None:
        """Give a pipeline the scheduler and the attention backend that were asked for.

        Raises:
            ValueError: If one of them is unknown or does not fit the model.
        """
        if self.scheduler is not None:
            pipe.scheduler = swap_scheduler(pipe.scheduler, self.scheduler)
        set_attention_backend(pipe.transformer, self.attention_backend, self.attention_prune_eps)

    def attention_record(self) -> dict[str, Any]:
        """Return what was chosen for attention, for manifests."""
        chosen = {"attention_backend": self.attention_backend, "attention_prune_eps": self.attention_prune_eps}
        return {name: value for name, value in chosen.items() if value}

    def settings(self, pipe: SDTPipeline) -> dict[str, Any]:
        """Return the arguments of a call of the pipeline: what was asked for, else what the pipeline has saved."""
        return pipe.sampling_settings(self.guidance_scale, self.num_inference_steps)


@dataclass(kw_only=True)
class PipelineArguments(SamplerArguments):
    """What to sample from, and how."""

    model: str = field(metadata={"help": "Folder or Hub name of a saved pipeline."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."} | a_seed())
    dtype: Dtype = field(default="float32", metadata={"help": "Type of the model's weights and arithmetic."})

    def settings(self, pipe: SDTPipeline) -> dict[str, Any]:
        """Return the arguments of `generate`: the seed, and what `SamplerArguments.settings` gives."""
        return {"seed": self.seed, **super().settings(pipe)}


@dataclass(kw_only=True)
class SamplingArguments(PipelineArguments):
    """What to sample from, and how, for many samples."""

    batch_size: int = field(default=64, metadata={"help": "Samples at a time on each process."} | between(1, 100_000))


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_pipeline(args: PipelineArguments, device: torch.device | str) -> SDTPipeline:
    """Load the pipeline to sample from, with the scheduler and the attention backend asked for.

    Raises:
        FileNotFoundError: If the folder holds no pipeline.
        ValueError: If the model is neither a folder nor on the Hub, is damaged or another kind of pipeline, or the
            scheduler, the number of steps or the backend does not fit.
    """
    path = Path(args.model).expanduser()
    is_path = path.is_dir() or args.model.startswith((".", "/", "~"))
    if is_path and not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"model: {args.model} holds no pipeline (no model_index.json).")
    try:
        pipe = open_pipeline(args.model, getattr(torch, args.dtype))
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    args.apply_to(pipe)
    args.settings(pipe)  # refuses steps beyond the schedule now rather than after the model's way to the device
    try:
        return pipe.to(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # torch's, for an unknown or missing device
        raise ValueError(f"device {device} cannot be used: {error}") from error


def set_attention_backend(model: SDTTransformer2DModel, name: str | None, prune_eps: float = 0.0) -> None:
    """Let a model attend through a backend of `sdt_diffusion.attention` or of diffusers.

    Args:
        model: The model.
        name: Name of the backend; `None` keeps the model's, or the default.
        prune_eps: See `spatial_decay_attention`.

    Raises:
        ValueError: If the backend is unknown, or cannot be used here.
    """
    if name in BACKENDS or (name is None and prune_eps):
        set_decay_backend(model, name, prune_eps)
    elif name is not None:
        if prune_eps:
            raise ValueError(
                f"attention_prune_eps must be 0 with the attention_backend {name}, which skips no tokens: choose one "
                f"of {', '.join(PRUNES)}."
            )
        try:
            model.set_attention_backend(name)
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(f"attention_backend {name!r} cannot be used. {error}") from error


def parse_classes(pipe: SDTPipeline, words: Sequence[str]) -> list[int]:
    """Return the labels of classes given as text, each a class name or an id.

    Names take precedence because they can be numbers themselves, as those of the digits are.

    Raises:
        ValueError: If a word is neither, means several classes, or an id is out of range.
    """

    def id_or_name(word):
        return int(word) if word not in pipe.labels and re.fullmatch(r"-?\d+", word) else word

    return pipe.prepare_class_labels([id_or_name(word) for word in words])
