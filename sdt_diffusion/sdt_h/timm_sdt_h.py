"""timm's interface to the classifier: `timm.create_model("sdt_h_tiny")` after `import sdt_diffusion.classification`.

timm's own scripts need that import first:

    python -c 'import runpy, sdt_diffusion.classification; runpy.run_path("train.py", run_name="__main__")' ...

`create_model` with all options of timm's factory, `features_only` with every feature class, `reset_classifier`, layer
decay, gradient checkpointing, `torch.jit.trace` and `torch.compile` work, and with them timm's `train.py` and
`validate.py`. `torch.jit.script`, which timm's `--torchscript` uses, is refused: it cannot compile attention.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices  # what timm's own models import; it has no public name
from torch import nn

from .network import SDTHNetwork, SDTHStage, check_images, preset_config

# Neither can be traced symbolically: the check reads shapes, and attention chooses its backend by them.
register_notrace_function(check_images)
register_notrace_module(SDTHStage)


class SDTHForTimm(SDTHNetwork):
    """`SDTHNetwork` with the names and methods that timm's factory and scripts call; the same weights.

    Args:
        in_chans: Channels of the images.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, in timm's names; "" for none, which gives logits at every position.
        drop_rate: Dropout before the classifier.
        img_size: Ignored, because images of any size work; timm's callers pass it to every model.
        device: Where to create the weights.
        dtype: Data type of the weights.
        **kwargs: Further arguments of `SDTHNetwork`.

    Raises:
        ValueError: See `SDTHNetwork`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        img_size: int | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ):
        with nullcontext() if device is None else torch.device(device):
            super().__init__(num_channels=in_chans, num_labels=num_classes, dropout=drop_rate, **kwargs)
        self.in_chans, self.num_features, self.global_pool = in_chans, self.proj.in_features, global_pool
        self.feature_info = [
            {"num_chs": stage.dim, "reduction": self.reduction * 2**i, "module": f"stages.{i}"}
            for i, stage in enumerate(self.stages)
        ]
        self.reset_classifier(num_classes, global_pool)
        self.to(dtype=dtype)

    def get_classifier(self) -> nn.Module:
        """Return the classifier; an identity if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialized one, and the pooling if one is given.

        Args:
            num_classes: Classes; 0 for no classifier.
            global_pool: Pooling in timm's names; "" for none. The present one stays by default.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        like = next(self.parameters())
        with like.device:
            pool, head = create_classifier(
                self.head_hidden_size, num_classes, pool_type=global_pool, use_conv=not global_pool
            )
        if num_classes:
            nn.init.trunc_normal_(head.weight, std=self.initializer_range)
            nn.init.zeros_(head.bias)
        self.pool = pool.train(self.training)
        self.head = head.to(like.dtype).train(self.training)
        self.num_classes, self.global_pool = num_classes, global_pool

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the outputs of some stages.

        Args:
            x: Images.
            indices: Stages to return; the last n for a number n, all for `None`.
            norm: Ignored: no norm follows the stages.
            stop_early: Do not run the stages after the last one that is returned.
            output_fmt: "NCHW", which all outputs have.
            intermediates_only: Whether to leave out the last output.

        Returns:
            The outputs asked for, after the last stage's unless `intermediates_only`.

        Raises:
            ValueError: If another format is asked for.
        """
        if str(getattr(output_fmt, "value", output_fmt)) != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}.")
        taken, last = feature_take_indices(len(self.stages), indices)
        feature_maps = self.forward_stages(x, last + 1 if stop_early else None)
        intermediates = [feature_maps[index + 1] for index in sorted(taken)]
        return intermediates if intermediates_only else (feature_maps[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and the head; return the stages' numbers."""
        taken, last = feature_take_indices(len(self.stages), indices)
        pruned = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or prune_head or pruned:
            self.reset_classifier(0, "")
            self.proj, self.norm, self.act = nn.Identity(), nn.Identity(), nn.Identity()
            self.num_features = self.head_hidden_size = self.stages[-1].dim
        return taken

    def __prepare_scriptable__(self) -> "SDTHForTimm":
        """Refuse `torch.jit.script`, which calls this first; its own message names a line of torch.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "SDT-H cannot be scripted, because TorchScript cannot compile attention that chooses its backend: use "
            "torch.compile (--torchcompile in timm's scripts), torch.jit.trace or torch.export."
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade speed for memory in training: blocks are computed again in the backward pass."""
        for stage in self.stages:
            stage.gradient_checkpointing = enable


def _default_cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2508.09525",
        "paper_name": "Learning Spatial Decay for Vision Transformers",
    }


default_cfgs = generate_default_cfgs({name: _default_cfg() for name in ("sdt_h_tiny", "sdt_h_small", "sdt_h_base")})


def _filter(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Accept the weights of `SDTHForImageClassification` too, whose names have a prefix."""
    return {name.removeprefix("network."): value for name, value in state_dict.items()}


def _create(variant: str, preset: str, pretrained: bool, **kwargs) -> SDTHForTimm:
    return build_model_with_cfg(
        SDTHForTimm,
        variant,
        pretrained,
        pretrained_filter_fn=_filter,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "flatten_sequential": True},
        **{**preset_config(preset), **kwargs},
    )


@register_model
def sdt_h_tiny(pretrained: bool = False, **kwargs) -> SDTHForTimm:
    """Build SDT-H-T."""
    return _create("sdt_h_tiny", "SDT-H-T", pretrained, **kwargs)


@register_model
def sdt_h_small(pretrained: bool = False, **kwargs) -> SDTHForTimm:
    """Build SDT-H-S."""
    return _create("sdt_h_small", "SDT-H-S", pretrained, **kwargs)


@register_model
def sdt_h_base(pretrained: bool = False, **kwargs) -> SDTHForTimm:
    """Build SDT-H-B."""
    return _create("sdt_h_base", "SDT-H-B", pretrained, **kwargs)
