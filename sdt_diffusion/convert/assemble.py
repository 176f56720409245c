"""Read a source, build its pipeline, and write it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import nn

from ..sdt import SDTPipeline, SDTTransformer2DModel
from ..sdt.vae import CHANNEL_STATISTICS, LatentNormalization, VAELayout
from ..utils.files import move_into, require_space, write_atomically
from ..utils.reading import check_finite, check_tensors, read_json, read_state_dict, shortened
from . import Source
from .diffusers_dit import read_diffusers_dit
from .facebook_dit import CHECKPOINT_KEYS, read_dit, write_dit
from .lightning_dit import is_lightning_dit, read_lightning_dit
from .sit import TIMESTEP_SCALE, read_sit, reverse_flow

#: Value of `kind` -> function that reads a checkpoint of that repository.
READERS = {"dit": read_dit, "sit": read_sit, "lightningdit": read_lightning_dit}
Kind = Literal["dit", "sit", "lightningdit"]


def read_source(
    path: Path, kind: Kind | None = None, num_attention_heads: int | None = None, numerics: str = "facebook"
) -> Source:
    """Read a checkpoint file of DiT, SiT or LightningDiT, or a folder of diffusers' DiT.

    Args:
        path: The file or folder.
        kind: Which repository a file is of. LightningDiT's own parts tell it; DiT and SiT look the same.
        num_attention_heads: Heads, where the width is not that of a published model.
        numerics: See `read_diffusers_dit`.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If it holds something else, or is damaged; says what.
    """
    if path.is_dir():
        if kind is not None or num_attention_heads is not None:
            raise ValueError(f"kind and num_attention_heads are for checkpoint files, and {path} is a folder.")
        read = partial(read_diffusers_dit, path, numerics)
    else:
        if numerics != "facebook":
            raise ValueError(f"numerics {numerics} is for folders of diffusers, and {path} is none.")
        state_dict = read_state_dict(path, CHECKPOINT_KEYS)
        whole = [name for name, tensor in state_dict.items() if not tensor.is_floating_point()]
        if whole:
            raise ValueError(f"{path}: {shortened(whole)} holds whole numbers, which are no weights.")
        check_finite(state_dict, str(path))
        if kind is None and is_lightning_dit(state_dict):
            kind = "lightningdit"
        if kind is None:
            raise ValueError(
                f"{path}: checkpoints of DiT and of SiT have the same tensors: give kind dit (predicts noise) or sit "
                "(predicts a flow)."
            )
        read = partial(READERS[kind], state_dict, num_attention_heads)
    try:
        return read()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"its parts do not fit each other ({error!r})"
        raise ValueError(f"{path}: {reason}") from error


def build_pipeline(
    source: Source,
    spatial_decay: str = "context",
    vae: nn.Module | None = None,
    id2label: dict[int, str] | None = None,
    latent_normalization: LatentNormalization | None = None,
) -> SDTPipeline:
    """Build the pipeline of a source.

    Args:
        source: The source.
        spatial_decay: Which decay training can add to the model; at first it is so weak that the outputs are the same.
        vae: VAE in place of the source's own.
        id2label: Class names in place of the source's own.
        latent_normalization: That of the VAE's latents in place of its own; see `read_latent_stats`.

    Raises:
        ValueError: If the parts do not fit each other, or the decay has no weights that could start weak.
    """
    if spatial_decay == "fixed":
        raise ValueError("spatial_decay fixed changes the outputs from the start: choose context, or none.")
    config = {**source.config, "spatial_decay": spatial_decay}
    if config["out_channels"] == config["in_channels"]:
        config["out_channels"] = None  # the default, as presets have it
    if spatial_decay != "none":
        config["decay_start"] = "none"
    model = SDTTransformer2DModel(**config).eval()
    expected = {name: value for name, value in model.state_dict().items() if ".gate." not in name}
    check_tensors(source.weights, expected, f"The checkpoint of {source.name}")
    model.load_state_dict(source.weights, strict=False)
    vae, id2label = vae or source.vae, id2label or source.id2label
    channels = None if vae is None else VAELayout.of(vae).latent_channels
    if channels not in (None, model.config.in_channels):
        raise ValueError(f"The VAE has {channels} latent channels, and the model {model.config.in_channels}.")
    if latent_normalization is not None:
        _normalize_latents(vae, latent_normalization)
    if id2label and set(id2label) != set(range(model.config.num_classes)):
        raise ValueError(
            f"There are {len(id2label)} class names, and the model has {model.config.num_classes} classes."
        )
    return SDTPipeline(
        model,
        source.scheduler,
        vae,
        id2label=id2label or None,
        num_inference_steps=source.num_inference_steps,
        uniform_sigmas=source.uniform_sigmas,
    )


def _normalize_latents(vae, normalization):
    if vae is None:
        raise ValueError("latent_stats are of the latents of a VAE: give vae too.")
    if CHANNEL_STATISTICS[0] not in vae.config or VAELayout.of(vae).is_normalized:
        raise ValueError(f"latent_stats are for an AutoencoderKL, and the VAE is an {type(vae).__name__}.")
    if len(normalization.shift_factor) != vae.config.latent_channels:
        raise ValueError(
            f"latent_stats are of {len(normalization.shift_factor)} channels, and the VAE has "
            f"{vae.config.latent_channels}."
        )
    normalization.register_with(vae)


def describe(source: Source, pipe: SDTPipeline) -> str:
    """Return, in one line, what the tensors of a source tell."""
    config = pipe.transformer.config
    options = [f"{key} {config[key]}" for key in ("norm_type", "activation_fn", "qk_norm") if key in source.config]
    options += ["rotary"] if config.rotary else []
    width = config.num_attention_heads * config.attention_head_dim
    learned = pipe.transformer.out_channels != config.in_channels
    return ", ".join(
        [
            f"{source.name}: {config.num_layers} blocks of width {width}",
            f"{config.num_attention_heads} heads",
            f"patch_size {config.patch_size}",
            f"{config.in_channels} channels of {config.sample_size}x{config.sample_size}",
            *(["learned variance"] if learned else []),
            f"{config.num_classes} classes",
            *options,
            f"{type(pipe.scheduler).__name__}",
            f"spatial_decay {config.spatial_decay}"
            + ("" if config.spatial_decay == "none" else " that starts as none"),
        ]
    )


def read_latent_stats(path: Path) -> LatentNormalization:
    """Read LightningDiT's `latents_stats.pt`: mean and standard deviation of each channel, as (z - mean) / std.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else; nothing in it is run.
    """
    stats = read_state_dict(path, ("stats",))
    mean, std = (stats.get(name, torch.empty(0)).double().flatten() for name in ("mean", "std"))
    if set(stats) != {"mean", "std"} or mean.numel() != std.numel() or not mean.numel() or not (std > 0).all():
        raise ValueError(f"{path} must hold a mean and a positive std of each channel, and nothing else.")
    return LatentNormalization((1 / std).tolist(), mean.tolist())


def read_class_names(path: Path) -> dict[int, str]:
    """Read class names: a JSON list of them, or an object of label ids and names.

    Raises:
        ValueError: If it holds something else.
    """
    values = read_json(path, object)
    if isinstance(values, list):
        values = dict(enumerate(values))
    names = {str(label): name for label, name in values.items()} if isinstance(values, dict) else {"": ""}
    if not all(label.isdecimal() and isinstance(name, str) and name for label, name in names.items()):
        raise ValueError(f"{path} must hold a list of class names, or an object of label ids and class names.")
    return {int(label): name for label, name in names.items()}


def export(pipe: SDTPipeline, kind: Literal["dit", "sit"]) -> dict[str, torch.Tensor]:
    """Return the state dict of a pipeline's model in the layout of DiT or SiT.

    Raises:
        ValueError: If their code could not load or compute such a model.
    """
    model = pipe.transformer
    weights: Mapping[str, torch.Tensor] = {name: value.float() for name, value in model.state_dict().items()}
    scale = {"dit": 1.0, "sit": TIMESTEP_SCALE}[kind]
    if model.config.timestep_scale != scale:
        raise ValueError(f"{kind} needs timestep_scale {scale}, and the model has {model.config.timestep_scale}.")
    state_dict = write_dit(model, reverse_flow(weights) if kind == "sit" else weights)
    check_finite(state_dict, "The model")
    return state_dict


def check_new_folder(folder: Path) -> None:
    """Refuse a destination that holds something, before a large checkpoint is read.

    Raises:
        ValueError: Names the folder, and what to do.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; give another name, or delete it.")


def save_pipeline(pipe: SDTPipeline, folder: Path) -> None:
    """Save a pipeline into a folder that must not exist, or be empty.

    Raises:
        ValueError: If the folder holds something.
        OSError: If it cannot be written, or the disk is too full.
    """
    check_new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    require_space(folder, num_bytes, "the pipeline")
    move_into(folder, pipe.save_pretrained)


def save_state_dict(state_dict: dict[str, torch.Tensor], path: Path) -> None:
    """Write a state dict to a new file, by safetensors or torch.save, as its ending says."""
    save = save_file if path.suffix == ".safetensors" else torch.save
    tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
    write_atomically(path, lambda partial: save(tensors, partial))
