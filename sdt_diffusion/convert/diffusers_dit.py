"""Convert `DiTPipeline` and `DiTTransformer2DModel` folders of diffusers.

diffusers computes other sines of the timestep than facebookresearch/DiT, whose weights the published folders hold:
numerics "facebook" gives the outputs that the weights were trained for, and "diffusers" those of diffusers.
"""

from pathlib import Path

import diffusers
import torch
from diffusers.schedulers import SchedulerMixin

from ..data.latents.training_data import load_vae
from ..sdt.loading import without_reports
from ..sdt.schedulers import check_scheduler_config
from ..utils.reading import read_json, shortened
from . import Source, ddpm_scheduler

TRANSFORMER = "DiTTransformer2DModel"
#: Config keys that have the same name and meaning here.
SAME_KEYS = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "sample_size")
#: Config keys and the values that DiT's architecture has.
ARCHITECTURE = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}


def read_diffusers_dit(folder: Path, numerics: str = "facebook") -> Source:
    """Read a folder that diffusers saved; its scheduler, VAE and class names are kept if it is a pipeline's.

    Args:
        folder: Of a `DiTPipeline`, or of its transformer alone.
        numerics: "facebook" or "diffusers".

    Raises:
        ValueError: If it holds something else, is damaged, or its blocks embed timestep and class differently.
    """
    is_pipeline = (folder / "model_index.json").is_file()
    model = _load_transformer(folder / "transformer" if is_pipeline else folder)
    stored = model.config
    config = {key: stored[key] for key in SAME_KEYS}
    config["num_classes"] = stored.num_embeds_ada_norm
    config["out_channels"] = stored.in_channels if stored.out_channels is None else stored.out_channels
    config["timestep_frequency_shift"] = 1.0 if numerics == "diffusers" else 0.0
    scheduler: SchedulerMixin = ddpm_scheduler(config["out_channels"] != config["in_channels"])
    vae, id2label = None, {}
    if is_pipeline:
        index = read_json(folder / "model_index.json")
        id2label = {int(label): name for label, name in (index.get("id2label") or {}).items()}
        if (folder / "scheduler").is_dir():
            check_scheduler_config(diffusers.DDPMScheduler.load_config(folder, subfolder="scheduler"))
            kind = getattr(diffusers, index["scheduler"][1])
            if not issubclass(kind, SchedulerMixin):
                raise ValueError(f"model_index.json names {kind.__name__} for a scheduler.")
            scheduler = kind.from_pretrained(folder, subfolder="scheduler")
        if (folder / "vae").is_dir():
            vae = load_vae(str(folder / "vae"))
    name = f"{TRANSFORMER} ({numerics} numerics)"
    return Source(name, config, _our_weights(model), scheduler, vae=vae, id2label=id2label)


def _load_transformer(folder: Path) -> torch.nn.Module:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model of diffusers (no config.json).")
    kind = read_json(folder / "config.json").get("_class_name")
    if kind != TRANSFORMER:
        raise ValueError(f"{folder} holds a {kind}, not a {TRANSFORMER}.")
    with without_reports():
        model, found = diffusers.DiTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    for names, what in ((found["missing_keys"], "no weights for"), (found["unexpected_keys"], "unknown weights")):
        if names:
            raise ValueError(f"{folder} has {what} {shortened(sorted(names))}.")
    other = [f"{key} {model.config[key]}" for key, value in ARCHITECTURE.items() if model.config[key] != value]
    if other:
        raise ValueError(f"{folder} is no DiT of facebookresearch's architecture: {', '.join(other)}.")
    return model


def _our_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's weights in our names, with one embedder in place of equal ones in all blocks."""
    weights: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        block, found, part = name.partition(".norm1.emb.")
        our_name = f"time_class_embed.{part}".replace(".embedding_table", "") if found else name
        our_name = our_name.replace(".attn1.", ".attn.")
        if not torch.equal(weights.setdefault(our_name, value.float()), value.float()):
            raise ValueError(f"{block} embeds timestep and class in its own way, as no DiT of facebookresearch does.")
    return weights
