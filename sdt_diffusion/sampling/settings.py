"""Sampling arguments shared by all scripts, and the pipeline and classes that they name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..attention import BACKENDS
from ..attention.dispatch import MAX_PRUNE_EPS, PRUNES
from ..attention_processor import set_decay_backend
from ..sdt import GUIDANCE_KINDS, SDTGuidance, SDTPipeline, SDTTransformer2DModel
from ..sdt.guidance import DECAY_FACTORS, RESCALE, clean_image_of
from ..sdt.loading import open_pipeline
from ..sdt.pipeline_inputs import SIDE_RANGE
from ..sdt.pipeline_sdt import DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_INFERENCE_STEPS
from ..sdt.schedulers import GUIDANCE, STEPS
from ..sdt.vae import LatentNormalization, VAELayout
from ..utils.arguments import json_object
from ..utils.ranges import RANGE_KEY, CheckedArguments, Range, a_seed, between
from .generate import describe_sampling

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class SamplerArguments(CheckedArguments):
    """How a model is sampled; training takes these and saves them in the pipeline."""

    scheduler: str | None = field(
        default=None,
        metadata={
            "help": "Class name of another diffusers scheduler than the pipeline's, or FlowMatchSDEScheduler.",
            "resumable": True,
        },
    )
    scheduler_options: str | None = field(
        default=None,
        metadata={
            "help": "Options of the scheduler as JSON, such as "
            '{"variance_type": "fixed_large", "timestep_spacing": "linspace"}, with which DDPMScheduler is DiT\'s.',
            "resumable": True,
        },
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
    guidance: Literal["cfg", "cfg_3channels", "apg", "autoguidance", "decay"] | None = field(
        default=None,
        metadata={
            "help": "Kind of guidance: away from the null class (on all channels, on three as DiT, or projected), "
            "from --guide_model, or from a stronger decay; by default that saved in the pipeline, else cfg.",
            "resumable": True,
        },
    )
    guidance_interval: list[float] | None = field(
        default=None,
        metadata={
            "help": "Guide only between two noise levels, the lower first; elsewhere a step costs half.",
            "resumable": True,
            RANGE_KEY: Range(0, 1e6),
        },
    )
    guidance_interval_unit: Literal["sigma", "timestep"] | None = field(
        default=None,
        metadata={
            "help": "Unit of --guidance_interval: the scheduler's sigma (0 to 1 for flows, noise over image for "
            "diffusion), which is the default, or timesteps from 0 to 1000.",
            "resumable": True,
        },
    )
    guidance_rescale: float | None = field(
        default=None,
        metadata={
            "help": "Share to which guided predictions get back the unguided standard deviation.",
            "resumable": True,
            RANGE_KEY: RESCALE,
        },
    )
    guide_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of the pipeline whose weaker model --guidance autoguidance guides away from.",
            "resumable": True,
        },
    )
    decay_guidance_factor: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the decay in the weaker prediction of --guidance decay; "
            f"{GUIDANCE_KINDS['decay']['decay_factor']:g} by default.",
            "resumable": True,
            RANGE_KEY: DECAY_FACTORS,
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

    def with_defaults(
        self,
        guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        num_inference_steps: int = DEFAULT_NUM_INFERENCE_STEPS,
    ) -> "SamplerArguments":
        """Return a copy that names guidance and steps, for a pipeline that has none saved yet."""
        guidance, steps = self.guidance_scale, self.num_inference_steps
        return replace(
            self,
            guidance_scale=guidance_scale if guidance is None else guidance,
            num_inference_steps=num_inference_steps if steps is None else steps,
        )

    def apply_to(self, pipe: SDTPipeline) -> None:
        """Give a pipeline the scheduler, the guidance and the attention backend that were asked for.

        Raises:
            ValueError: If one of them is unknown or does not fit the model.
        """
        options = json_object(self.scheduler_options, "scheduler_options")
        if self.scheduler is not None or options:
            name = self.scheduler or type(pipe.scheduler).__name__
            pipe.swap_scheduler(name, **options)
        self._apply_guidance_to(pipe)
        for model in (pipe.transformer, pipe.guide_transformer):
            if model is not None:
                set_attention_backend(model, self.attention_backend, self.attention_prune_eps)

    def _apply_guidance_to(self, pipe: SDTPipeline) -> None:
        options: dict[str, Any] = {
            "guidance_rescale": self.guidance_rescale,
            "decay_factor": self.decay_guidance_factor,
        }
        options = {name: value for name, value in options.items() if value is not None}
        if self.guidance_interval is not None:
            unit = self.guidance_interval_unit or "sigma"
            options |= {"guidance_interval": self.guidance_interval, "interval_unit": unit}
        elif self.guidance_interval_unit is not None:
            raise ValueError("guidance_interval_unit is the unit of guidance_interval, which is not given.")
        if self.guidance is None and self.guide_model is None and not options:
            return
        guider = (pipe.guider or SDTGuidance()) if self.guidance is None else SDTGuidance.from_kind(self.guidance)
        if not isinstance(guider, SDTGuidance):
            raise ValueError(
                f"guidance must be named: options cannot be added to the pipeline's {type(guider).__name__}."
            )
        if self.decay_guidance_factor is not None and guider.config.decay_factor is None:
            raise ValueError(f"decay_guidance_factor is for guidance decay, not for {self.guidance or 'cfg'}.")
        if self.guide_model is not None and not guider.config.guide_model:
            raise ValueError(f"guide_model is for guidance autoguidance, not for {self.guidance or 'cfg'}.")
        weaker = pipe.guide_transformer if guider.config.guide_model else None
        if self.guide_model is not None:
            weaker = _open_guide(self.guide_model, pipe)
        elif guider.config.guide_model and weaker is None:
            raise ValueError("guidance autoguidance needs a guide_model, the pipeline of a weaker model.")
        scale = pipe.own_guidance_scale if self.guidance_scale is None else self.guidance_scale
        pipe.register_modules(guider=guider.new(guidance_scale=scale, **options), guide_transformer=weaker)

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
    height: int | None = field(
        default=None, metadata={"help": "Height in pixels, the trained one by default.", RANGE_KEY: SIDE_RANGE}
    )
    width: int | None = field(
        default=None, metadata={"help": "Width in pixels, the trained one by default.", RANGE_KEY: SIDE_RANGE}
    )
    pos_embed_scaling: Literal["none", "interpolate", "ntk"] | None = field(
        default=None, metadata={"help": "Positions on other grids than the trained one; the model's way by default."}
    )
    rotary_scaling: Literal["none", "interpolate", "ntk"] | None = field(
        default=None, metadata={"help": "The same for the positions of a rotary embedding."}
    )
    decay_distance_scaling: bool | None = field(
        default=None,
        metadata={"help": "Whether the decay measures distances on other grids in patches of the trained one."},
    )

    def apply_to(self, pipe: SDTPipeline) -> None:
        """Apply the scalings too; see `SamplerArguments.apply_to`."""
        super().apply_to(pipe)
        for model in (pipe.transformer, pipe.guide_transformer):
            if model is not None:
                model.set_grid_scaling(self.pos_embed_scaling, self.rotary_scaling, self.decay_distance_scaling)

    def settings(self, pipe: SDTPipeline) -> dict[str, Any]:
        """Return the arguments of `generate`, with the sides of the images if they were given.

        Raises:
            ValueError: If a side is not divisible into patches.
        """
        pipe.check_inputs(self.height, self.width)
        sides = {"height": self.height, "width": self.width}
        return super().settings(pipe) | {name: side for name, side in sides.items() if side is not None}


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
    if path.is_file():
        hint = "turn a checkpoint of DiT, SiT or LightningDiT into one by sdt-diffusion convert"
        raise ValueError(f"model: {args.model} is a file, and not the folder of a pipeline; {hint}.")
    if is_path and not (path / "model_index.json").is_file():
        raise FileNotFoundError(f"model: {args.model} holds no pipeline (no model_index.json).")
    try:
        pipe = open_pipeline(args.model, getattr(torch, args.dtype))
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    args.apply_to(pipe)
    # Refuse steps beyond the schedule, or guidance at none of them, now rather than after the way to the device.
    describe_sampling(pipe, args.settings(pipe))
    try:
        return pipe.to(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # torch's, for an unknown or missing device
        raise ValueError(f"device {device} cannot be used: {error}") from error


def _open_guide(name: str, pipe: SDTPipeline) -> SDTTransformer2DModel:
    """Open the model of another pipeline that was trained to predict the same."""
    try:
        guide = open_pipeline(name, pipe.transformer.dtype)
    except ValueError as error:
        raise ValueError(f"guide_model: {error}") from error
    ours, theirs = ([clean_image_of(each.scheduler, step) for step in (1, 500, 999)] for each in (pipe, guide))
    if not np.allclose(ours, theirs):
        raise ValueError(f"guide_model: {name} predicts something else, or at other noise levels, than the model.")
    if [pipe.id2label, *_latent_scale(pipe)] != [guide.id2label, *_latent_scale(guide)]:
        raise ValueError(f"guide_model: {name} has other classes or another VAE than the model.")
    return guide.transformer.to(pipe.transformer.device)


def _latent_scale(pipe: SDTPipeline) -> list[Any]:
    if pipe.vae is None:
        return []
    channels = VAELayout.of(pipe.vae).latent_channels
    return [type(pipe.vae).__name__, channels, *LatentNormalization.of(pipe.vae)]


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
