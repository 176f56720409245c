"""Build the classifier that a training run's arguments describe."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from ..data.decoding import IMAGE_MODES
from ..probe import Backbone, SDTForImageClassification, load_backbone
from ..sdt.presets import PRESETS as TRANSFORMER_PRESETS
from ..sdt_h.modeling_sdt_h import SDTHConfig, SDTHForImageClassification, SDTHImageProcessor
from ..sdt_h.network import PRESETS
from ..utils.arguments import json_object, one_line
from ..utils.pretrained import load_network
from ..utils.ranges import CheckedArguments, Range, at_least, between, check_value
from ..utils.reading import check_finite, read_json

#: Config values that are derived from the data set.
DERIVED_KEYS = frozenset(
    {"num_channels", "num_labels", "id2label", "label2id", "in_channels", "sample_size", "num_classes"}
)
#: Names of the classifier layer's weights.
HEAD_PREFIX = "network.head."
#: Kind of `model` -> arguments that apply to this kind but not to all kinds.
ARGUMENTS_OF_KIND = {
    "preset": {"spatial_decay", "drop_path", "model_overrides"},
    "transformer": {"spatial_decay", "model_overrides"},
    "classifier": {"drop_path", "reinitialise_head"},
    "backbone": {"probe_block", "probe_timestep", "probe_objective", "finetune"},
}


@dataclass
class ClassifierModelArguments(CheckedArguments):
    """The model to train: SDT-H, a transformer of the generative one's blocks, or a head on a trained one."""

    model: str = field(
        default="SDT-H-T",
        metadata={
            "help": "A preset: SDT-H-{T,S,B} or SDT-H-digits, or one of train_dit.py such as SDT-S/4+, a transformer "
            "without convolutions; the folder of an SDT-H to start from; or that of a trained SDT pipeline or "
            "transformer, to put a head on."
        },
    )
    spatial_decay: Literal["context", "fixed", "content", "raster", "none"] | None = field(
        default=None, metadata={"help": "How a preset's attention decays; 'fixed' is RMT, 'context' the default."}
    )
    drop_path: float | None = field(
        default=None,
        metadata={"help": "Drop path probability of SDT-H's last block; the preset's by default."}
        | between(0, 1, with_most=False),
    )
    model_overrides: str | None = field(
        default=None, metadata={"help": 'Further config values of a preset as JSON, such as {"depths": [1, 1, 2, 1]}.'}
    )
    reinitialise_head: bool = field(
        default=False,
        metadata={
            "help": "Start from an SDT-H of other classes: its classifier layer, and nothing else, is new.",
            "aliases": ["--reinitialize_head"],  # runs have saved the British spelling, so the name stays
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Trade speed for memory.", "resumable": True}
    )
    probe_block: int | None = field(
        default=None,
        metadata={"help": "Block of the transformer whose tokens the head sees, from 0; the middle one by default."}
        | at_least(0),
    )
    probe_timestep: float | None = field(
        default=None,
        metadata={"help": "Noise level of its input: a DDPM timestep, or 1000 sigma of a flow; 200 by default."}
        | between(0, 1000),
    )
    probe_objective: Literal["flow", "ddpm"] | None = field(
        default=None,
        metadata={"help": "Objective of a transformer without a pipeline; flow by default."},
    )
    finetune: bool = field(default=False, metadata={"help": "Train that transformer too, not the head alone."})

    def __post_init__(self):
        super().__post_init__()
        of_other_kinds = set.union(*ARGUMENTS_OF_KIND.values()) - ARGUMENTS_OF_KIND[self.kind]
        for f in fields(self):
            if f.name in of_other_kinds and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name} does not apply to model {self.model}, which is a {self.kind}.")

    @property
    def kind(self) -> str:
        """Kind of `model`, a key of `ARGUMENTS_OF_KIND`.

        Raises:
            ValueError: If `model` is neither a preset nor the folder of a model, or its config.json is damaged.
        """
        if self.model in PRESETS:
            return "preset"
        if self.model in TRANSFORMER_PRESETS:
            return "transformer"
        folder = Path(self.model)
        if (folder / "model_index.json").is_file():
            return "backbone"
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            if config.get("_class_name") == "SDTTransformer2DModel":
                return "backbone"
            if config.get("model_type") == SDTHForImageClassification.config_class.model_type:
                return "classifier"
        raise ValueError(
            f"model {self.model!r} is neither a preset ({', '.join(PRESETS)}, or one of train_dit.py) nor the folder "
            "of an SDT-H, of an SDT pipeline, or of its transformer."
        )

    @cached_property
    def backbone(self) -> Backbone | None:
        """The trained generative transformer, if there is one.

        Raises:
            ValueError: If the folder is damaged.
        """
        if self.kind != "backbone":
            return None
        try:
            backbone = load_backbone(self.model, self.probe_objective)
        except Exception as error:  # diffusers and safetensors raise their own for each kind of damage
            raise ValueError(f"model {self.model} cannot be loaded: {one_line(error)}") from error
        check_finite(backbone.transformer.state_dict(), f"model {self.model}")
        return backbone

    @cached_property
    def processor(self) -> SDTHImageProcessor | None:
        """The image processor saved with the classifier to start from, if there is one.

        Raises:
            ValueError: If it does anything but resize the shorter side, crop a square and normalize.
        """
        path = Path(self.model) / "preprocessor_config.json"
        return load_processor(path) if self.kind == "classifier" and path.is_file() else None

    @property
    def default_resolution(self) -> int:
        """Side of the images in pixels if the arguments do not set it."""
        if self.processor is not None:
            return self.processor.crop_size["height"]
        if self.kind == "transformer":
            return TRANSFORMER_PRESETS[self.model]["sample_size"]
        return 224 if self.backbone is None else self.backbone.resolution

    @property
    def image_mode(self) -> str | None:
        """Mode of the images, if the model fixes it."""
        return None if self.backbone is None else self.backbone.image_mode

    def build(self, num_channels: int, class_names: list[str], resolution: int) -> PreTrainedModel:
        """Build the model to train.

        Args:
            num_channels: Channels of the images.
            class_names: Names of the classes, in the order of their labels.
            resolution: Side of the images in pixels, which decides a transformer's grid.

        Raises:
            ValueError: If a value or the classes do not fit the model, or `model_overrides` is not a JSON object.
        """
        labels: dict[str, Any] = {
            "id2label": dict(enumerate(class_names)),
            "label2id": {name: label for label, name in enumerate(class_names)},
        }
        backbone = self.backbone
        if backbone is not None:
            if num_channels != backbone.num_channels:
                mode = backbone.image_mode
                raise ValueError(f"The transformer of {self.model} takes {mode} images: set image_mode to {mode}.")
            model = SDTForImageClassification.from_backbone(
                backbone,
                block=self.probe_block,
                timestep=200 if self.probe_timestep is None else self.probe_timestep,
                freeze_backbone=not self.finetune,
                **labels,
            )
        elif self.kind == "classifier":
            model = self._load_classifier(num_channels, class_names, labels)
        else:
            own = {"spatial_decay": self.spatial_decay, "drop_path_rate": self.drop_path}
            own = {key: value for key, value in own.items() if value is not None}
            overrides = {**own, **self._overrides()}
            try:
                if self.kind == "transformer":
                    overrides |= {"in_channels": num_channels, "sample_size": resolution}
                    model = SDTForImageClassification.from_preset(self.model, **overrides, **labels)
                else:
                    overrides |= {"num_channels": num_channels}
                    model = SDTHForImageClassification.from_preset(self.model, **overrides, **labels)
            except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError) as error:
                if self.model_overrides is None:
                    raise
                raise ValueError(
                    f"model_overrides {self.model_overrides:.99} make no model: {one_line(error)}"
                ) from error
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def _load_classifier(
        self, num_channels: int, class_names: list[str], labels: dict[str, Any]
    ) -> SDTHForImageClassification:
        try:
            config = SDTHConfig.from_pretrained(self.model)
        except Exception as error:  # transformers raises its own for each kind of damage
            raise ValueError(f"model {self.model}: config.json is damaged: {one_line(error)}") from error
        if config.num_channels != num_channels:
            mode = IMAGE_MODES.get(config.num_channels)
            raise ValueError(
                f"model {self.model} takes images of {config.num_channels} channel(s), not of {num_channels}"
                + (f": set image_mode to {mode}." if mode else ".")
            )
        if not self.reinitialise_head:
            check_same_labels(self.model, config, class_names)
        own = {} if self.drop_path is None else {"drop_path_rate": self.drop_path}
        may_lack = (HEAD_PREFIX,) if self.reinitialise_head else ()
        model = load_network(
            SDTHForImageClassification,
            self.model,
            "an SDT-H classifier",
            may_lack,
            ignore_mismatched_sizes=True,
            **labels,
            **own,
        )
        if self.reinitialise_head:
            model.network.initialize(model.network.head)
        return model

    def _overrides(self) -> dict[str, Any]:
        overrides = json_object(self.model_overrides, "model_overrides")
        derived = sorted(DERIVED_KEYS & set(overrides))
        if derived:
            raise ValueError(f"model_overrides: {', '.join(derived)} follow from the data set.")
        return overrides


def load_processor(path: Path) -> SDTHImageProcessor:
    """Load an image processor from a preprocessor_config.json, if training supports its steps.

    Raises:
        ValueError: If it does anything but resize the shorter side, crop a square and normalize pixels.
    """
    try:
        processor = SDTHImageProcessor.from_dict(read_json(path))
        size, crop = dict(processor.size), dict(processor.crop_size)
        for number in (processor.rescale_factor, *processor.image_mean, *processor.image_std):
            check_value("a number", number, (float,), Range(-1000, 1000))
        for side in (*size.values(), *crop.values()):
            if side is not None:
                check_value("a side", side, (int,), Range(1, 65_536))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an image processor's: {one_line(error)} Correct it, or remove it.") from error
    steps, factor = ("do_resize", "do_center_crop", "do_rescale", "do_normalize"), processor.rescale_factor
    fits = {
        **{name: getattr(processor, name) is True for name in steps},
        "size": [key for key, value in size.items() if value is not None] == ["shortest_edge"],
        "crop_size": crop.get("height") is not None and crop.get("height") == crop.get("width"),
        "rescale_factor": abs(255 * factor - 1) < 1e-3,
        "image_std": len(processor.image_mean) == len(processor.image_std) and min(processor.image_std) > 0,
    }
    for name, fit in fits.items():
        if not fit:
            raise ValueError(
                f"{path}: {name} is {getattr(processor, name)}, but training resizes the shorter side, crops a square "
                "and normalizes pixels of 0 to 1. Correct it, or remove the file to start from the defaults."
            )
    return processor


def check_same_labels(model: str, config: SDTHConfig, class_names: list[str]) -> None:
    """Refuse a trained classifier whose labels mean other classes; without names, the number of labels decides.

    Args:
        model: Name of the classifier in messages.
        config: Config of the classifier.
        class_names: Names of the data set's classes, in the order of their labels.

    Raises:
        ValueError: Names both numbers of classes, or the first names that differ, and what to do.
    """
    remedy = "Set reinitialise_head for a new classifier layer on its other weights."
    if config.num_labels != len(class_names):
        raise ValueError(
            f"model {model} has {config.num_labels} labels, the data set {len(class_names)} classes. {remedy}"
        )
    names = [config.id2label[label] for label in range(config.num_labels)]
    if names in (class_names, [f"LABEL_{label}" for label in range(config.num_labels)]):
        return
    label = next(label for label, name in enumerate(names) if name != class_names[label])
    order = ", and the same names in another order" if sorted(names) == sorted(class_names) else ""
    raise ValueError(
        f"Label {label} is {names[label]!r} to model {model}, but {class_names[label]!r} in the data set{order}. "
        f"{remedy}"
    )
