"""Train a classifier by DeiT's recipe ("Training data-efficient image transformers", Touvron et al. 2021).

The parts are timm's, each of them off by default and named as in timm's training script.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.auto_augment import posterize
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import nn

from ..sdt_h.modeling_sdt_h import SDTHImageProcessor
from ..utils.ranges import RANGE_KEY, CheckedArguments, Range, between, check_number, check_value
from ..utils.seeding import Draws, Stream, seeded_cpu_generators
from .config import RunArguments
from .optimizer import OptimizationArguments

#: A smaller part of the image would be enlarged from more pixels than memory holds.
CROP_PCT = Range(0.05, 1)
#: Largest number in timm's words of an automatic augmentation, since more operations would take forever; of mstd,
#: where more than 100 means that magnitudes are uniform, it is ten times this.
MAX_IN_AUTO_AUGMENT = 100


@dataclass
class RecipeArguments(CheckedArguments):
    """Augmentation, mixing, and what else a classifier is trained with."""

    num_train_epochs: float | None = field(
        default=None,
        metadata={"help": "Length in passes over the data, instead of --max_train_steps.", "resumable": True}
        | between(0, 1_000_000, with_least=False),
    )
    lr_warmup_epochs: float | None = field(
        default=None,
        metadata={"help": "Warm-up in passes over the data, instead of --lr_warmup_steps."} | between(0, 1_000_000),
    )
    layer_decay: float | None = field(
        default=None,
        metadata={"help": "Factor of the learning rate from each layer to the one below it."}
        | between(0, 1, with_least=False),
    )
    scale: list[float] = field(
        default_factory=lambda: [1.0, 1.0],
        metadata={"help": "Area of random crops, least and largest, of the image's."}
        | between(0, 1, with_least=False),
    )
    ratio: list[float] = field(
        default_factory=lambda: [1.0, 1.0],
        metadata={"help": "Width by height of random crops, least and largest."} | between(0.01, 100),
    )
    train_interpolation: Literal["bicubic", "bilinear", "random"] = field(
        default="bicubic", metadata={"help": "How crops are resized."}
    )
    aa: str | None = field(
        default=None, metadata={"help": "Automatic augmentation in timm's words, such as rand-m9-mstd0.5-inc1."}
    )
    color_jitter: float = field(
        default=0.0, metadata={"help": "Strength of color jitter, if there is no --aa."} | between(0, 10)
    )
    reprob: float = field(default=0.0, metadata={"help": "Probability of erasing a rectangle."} | between(0, 1))
    remode: Literal["const", "rand", "pixel"] = field(default="pixel", metadata={"help": "What fills the rectangle."})
    recount: int = field(default=1, metadata={"help": "Rectangles to erase."} | between(1, 1000))
    aug_repeats: int = field(
        default=1, metadata={"help": "Augmented copies of an image in a batch; DeiT's is 3."} | between(1, 1000)
    )
    mixup: float = field(default=0.0, metadata={"help": "Alpha of mixup; 0 for none."} | between(0, 1000))
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix; 0 for none."} | between(0, 1000))
    mixup_prob: float = field(
        default=1.0, metadata={"help": "Probability of mixing, if either is on."} | between(0, 1)
    )
    mixup_switch_prob: float = field(
        default=0.5, metadata={"help": "Probability of CutMix, if both are on."} | between(0, 1)
    )
    mixup_mode: Literal["batch", "pair", "elem"] = field(
        default="batch", metadata={"help": "What is mixed by the same proportion."}
    )
    smoothing: float = field(default=0.0, metadata={"help": "Label smoothing."} | between(0, 1))
    crop_pct: float | None = field(
        default=None,
        metadata={
            "help": "Part of the shorter side that evaluation sees; that of --model's folder, or 1, by default.",
            RANGE_KEY: CROP_PCT,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            if len(value) != 2 or value[0] > value[1]:
                raise ValueError(f"{name} takes the least and the largest value, such as 0.8 1.0, not {value}.")
        if self.aa:
            check_auto_augment(self)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return bool(self.mixup or self.cutmix) and self.mixup_prob > 0

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse an odd number of images where timm mixes the first with the last one and so on.

        Raises:
            ValueError: If images are to be mixed and their number is odd.
        """
        if self.mixes and batch_size % 2:
            raise ValueError(f"train_batch_size must be even for mixup and cutmix, not {batch_size}.")

    def resolve_epochs(
        self, run: RunArguments, optimization: OptimizationArguments, num_images: int, num_processes: int
    ) -> tuple[RunArguments, OptimizationArguments]:
        """Return the arguments with lengths given in epochs turned into steps; an epoch is `num_images` samples."""
        per_step = run.train_batch_size * run.gradient_accumulation_steps * num_processes
        if self.num_train_epochs is not None:
            run = replace(run, max_train_steps=math.ceil(self.num_train_epochs * num_images / per_step))
        if self.lr_warmup_epochs is not None:
            warmup = math.ceil(self.lr_warmup_epochs * num_images / per_step)
            optimization = replace(optimization, lr_warmup_steps=warmup)
        return run, optimization


def build_processor(
    num_channels: int,
    resolution: int,
    crop_pct: float | None = None,
    imagenet_normalization: bool = True,
    base: SDTHImageProcessor | None = None,
) -> SDTHImageProcessor:
    """Build the image processor that is saved with the classifier and that evaluation uses too.

    Args:
        num_channels: 3, or 1 for gray images.
        resolution: Side of the square that the model sees.
        crop_pct: That side in units of the image's shorter one; that of `base`, or 1, by default.
        imagenet_normalization: ImageNet's mean and deviation for color images; otherwise, and for gray ones, pixels
            lie in -1 to 1.
        base: The processor of the model that training starts from, whose mean, deviation and interpolation are kept.

    Raises:
        ValueError: If `base` has values for another number of channels.
    """
    check_value("resolution", resolution, (int,), Range(1, 65_536))
    if crop_pct is not None:
        check_number("crop_pct", crop_pct, CROP_PCT)
    if base is not None:
        if len(base.image_mean) != num_channels:
            raise ValueError(
                f"The model's preprocessor_config.json has {len(base.image_mean)} value(s) in image_mean, the images "
                f"{num_channels} channel(s): correct the file, or remove it to start from the defaults."
            )
        try:
            side, crop = base.size["shortest_edge"], base.crop_size["height"]
            check_value("shortest_edge", side, (int,), Range(1, 1_000_000))
            check_value("crop_size", crop, (int,), Range(1, 1_000_000))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The model's preprocessor_config.json has no usable size and crop_size ({error}): correct the file, "
                "or remove it to start from the defaults."
            ) from error
        if crop_pct is not None:
            side = round(resolution / crop_pct)
        elif resolution != crop:
            side = round(resolution * side / crop)
        values = {**base.to_dict(), "size": {"shortest_edge": side}}
        return SDTHImageProcessor(**{**values, "crop_size": {"height": resolution, "width": resolution}})
    crop_pct = 1.0 if crop_pct is None else crop_pct
    imagenet = imagenet_normalization and num_channels == 3
    return SDTHImageProcessor(
        size={"shortest_edge": round(resolution / crop_pct)},
        crop_size={"height": resolution, "width": resolution},
        image_mean=list(IMAGENET_DEFAULT_MEAN) if imagenet else [0.5] * num_channels,
        image_std=list(IMAGENET_DEFAULT_STD) if imagenet else [0.5] * num_channels,
        do_convert_rgb=num_channels == 3,
    )


def train_transform(
    args: RecipeArguments, processor: SDTHImageProcessor, random_flip: bool
) -> Callable[[Image.Image], torch.Tensor]:
    """Build timm's training transform, with the size and normalization of the processor."""
    transform = create_transform(
        processor.crop_size["height"],
        is_training=True,
        scale=tuple(args.scale),
        ratio=tuple(args.ratio),
        hflip=0.5 if random_flip else 0.0,
        color_jitter=args.color_jitter or None,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
    for step in transform.transforms:
        # RandAugment and AugMix have operations, AutoAugment has lists of them.
        for operation in (*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))):
            if operation.aug_fn is posterize:
                operation.level_fn = partial(_posterize_level, operation.level_fn)
    return transform


def _posterize_level(level_fn: Callable, level: float, hparams: dict[str, Any]) -> tuple[int]:
    """Keep at least one bit: at full magnitude timm asks for none, which newer versions of Pillow refuse."""
    (bits,) = level_fn(level, hparams)
    return (max(1, bits),)


def check_auto_augment(args: RecipeArguments) -> None:
    """Refuse an `aa` that timm does not understand, or of which it would ignore a part.

    timm notices some mistakes only in use, so a small image is augmented.

    Raises:
        ValueError: Names the value, what is wrong with it, and examples.
    """
    wrong = None
    for word in (args.aa or "").split("-")[1:]:
        # timm skips words without a number, except for names of sets of transforms.
        if word != "tweights" and not any(letter.isdigit() for letter in word):
            wrong = f"timm would ignore {word!r}"
        limit = MAX_IN_AUTO_AUGMENT * (10 if word.startswith("mstd") else 1)
        if any(float(number) > limit for number in re.findall(r"[0-9]+", word)):
            wrong = f"{word!r} is above {limit}"
    if wrong is None:
        try:
            transform = train_transform(args, build_processor(3, 8), random_flip=False)
            with seeded_cpu_generators(Stream.AUGMENTATION, 0, 0):  # leaves the global generators as they were
                transform(Image.new("RGB", (8, 8)))
        except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            wrong = str(error) or type(error).__name__
    if wrong is not None:
        raise ValueError(
            f"aa {args.aa!r} is not an automatic augmentation of timm ({wrong}): give one such as "
            "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original-mstd0.5 or 3a."
        )


class ClassificationLoss:
    """Cross entropy with soft targets: smoothed labels, of mixed images if the recipe says so.

    Args:
        args: The recipe.
        num_labels: Classes.
    """

    def __init__(self, args: RecipeArguments, num_labels: int):
        self.num_labels, self.smoothing = num_labels, args.smoothing
        self.cross_entropy = SoftTargetCrossEntropy()
        self.mixup = None
        if args.mixes:
            self.mixup = Mixup(
                mixup_alpha=args.mixup,
                cutmix_alpha=args.cutmix,
                prob=args.mixup_prob,
                switch_prob=args.mixup_switch_prob,
                mode=args.mixup_mode,
                label_smoothing=args.smoothing,
                num_classes=num_labels,
            )

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, draws: Draws | None = None
    ) -> torch.Tensor:
        """Compute the loss of a batch; may overwrite `images`. timm mixes by NumPy's generator, not by `draws`."""
        if self.mixup is None:
            targets = mixup_target(labels, self.num_labels, smoothing=self.smoothing)
        else:
            images, targets = self.mixup(images, labels)
        return self.cross_entropy(model(images).logits.float(), targets)

    def pop_values(self) -> dict[str, float]:
        """Return an empty dictionary: there is nothing to log besides the loss."""
        return {}


def layer_decay_groups(model: nn.Module, args: RecipeArguments, weight_decay: float) -> list[dict[str, Any]] | None:
    """Group parameters by depth, with falling learning rates; return `None` if the recipe has no layer decay."""
    if args.layer_decay is None:
        return None
    return param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=args.layer_decay
    )
