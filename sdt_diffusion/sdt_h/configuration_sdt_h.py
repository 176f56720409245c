"""SDTHConfig, the classifier's config for transformers."""

import inspect
from typing import Any

from transformers import PretrainedConfig

from .network import SDTHNetwork, preset_config

#: Arguments of `SDTHNetwork`, except the number of labels, which transformers keeps as `id2label`.
NETWORK_KEYS = tuple(key for key in inspect.signature(SDTHNetwork).parameters if key != "num_labels")


class SDTHConfig(PretrainedConfig):
    """Config of `SDTHForImageClassification` and `SDTHModel`.

    Args:
        **kwargs: The arguments of `SDTHNetwork` (2 labels by default, as everywhere in transformers), and what every
            config takes, such as `id2label`.
    """

    model_type = "sdt_h"

    def __init__(self, **kwargs):
        for key, parameter in inspect.signature(SDTHNetwork).parameters.items():
            if key in NETWORK_KEYS:
                value = kwargs.pop(key, parameter.default)
                setattr(self, key, list(value) if isinstance(value, tuple) else value)  # as it comes back from JSON
        super().__init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SDTHConfig":
        """Make the config of a named size.

        Args:
            name: A key of `PRESETS`, such as "SDT-H-T".
            **overrides: Config values in place of the preset's, `num_labels` or `id2label` among them.

        Raises:
            ValueError: If the preset or a key is unknown; the message lists the known ones.
        """
        labels = {key: overrides.pop(key) for key in ("id2label", "label2id", "problem_type") if key in overrides}
        return cls(**preset_config(name, **overrides), **labels)

    def network_config(self) -> dict[str, Any]:
        """Return the arguments of `SDTHNetwork`."""
        return {"num_labels": self.num_labels, **{key: getattr(self, key) for key in NETWORK_KEYS}}
